"""Sparse encode against the dense product at the selected pairs: values and every gradient."""

import pytest
import torch
from pairs import CASES, assert_no_worse, fresh, randn, random_selection

from fastdiff.kernels import ops, reference

pytestmark = pytest.mark.gpu


def dense(x, W_enc, b_enc, s):
    return reference.encoder_scores(x, W_enc, b_enc)[s.row, s.col]


@pytest.mark.parametrize("backend", ["torch", "triton", "dense"])
@pytest.mark.parametrize(("B", "F", "C", "density"), [*CASES, (4, 6, 5, -1.0)])
def test_is_the_dense_product_in_float64(backend, B, F, C, density):
    s = random_selection(B, F, density, seed=B)
    x, W_enc, b_enc = randn(B, C, seed=1), randn(F, C, seed=2).requires_grad_(), randn(F, seed=3).requires_grad_()
    d_values = randn(len(s.col), seed=4)
    want = dense(x, W_enc, b_enc, s)
    got = ops.sparse_encode(x, W_enc, b_enc, ops.encoder_scores(x, W_enc, b_enc), s, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(out, (W_enc, b_enc), d_values) for out in (got, want))
    for got_grad, want_grad in zip(*gradients, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_no_worse_than_plain_low_precision(backend, dtype):
    s = random_selection(9, 30, 0.3, seed=4)
    x, W_enc = randn(9, 35, seed=1, dtype=dtype), randn(30, 35, seed=2, dtype=dtype).requires_grad_()
    b_enc = randn(30, seed=3, dtype=torch.float32).requires_grad_()
    d_values = randn(len(s.col), seed=4, dtype=dtype)

    def gradients(to):
        W, b = W_enc.detach().to(to).requires_grad_(), b_enc.detach().to(to).requires_grad_()
        return torch.autograd.grad(dense(x.to(to), W, b, s), (W, b), d_values.to(to))

    pre = ops.encoder_scores(x, W_enc, b_enc)
    assert pre.dtype == torch.float32
    got = ops.sparse_encode(x, W_enc, b_enc, pre, s, backend=backend)
    got = torch.autograd.grad(got, (W_enc, b_enc), d_values.float())
    assert [t.dtype for t in got] == [dtype, torch.float32]
    for mine, plain, truth in zip(got, gradients(dtype), gradients(torch.float64), strict=True):
        assert_no_worse(mine, plain, truth, tol=1e-5)


@pytest.mark.parametrize("wanted", ["W_enc", "b_enc"])
def test_only_the_asked_gradient_is_computed(wanted, monkeypatch):
    from fastdiff.kernels import sparse_encode as module

    calls = []
    for name in ("weighted_rows", "sum_by_latent"):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, op=op, name=name: calls.append(name) or op(*a))
    s = random_selection(6, 20, 0.2, seed=3)
    x, W_enc, b_enc = randn(6, 4, seed=1), randn(20, 4, seed=2), randn(20, seed=3)
    {"W_enc": W_enc, "b_enc": b_enc}[wanted].requires_grad_()
    ops.sparse_encode(x, W_enc, b_enc, ops.encoder_scores(x, W_enc, b_enc), s).sum().backward()
    assert calls == ["weighted_rows" if wanted == "W_enc" else "sum_by_latent"]
    assert (W_enc.grad is not None, b_enc.grad is not None) == (wanted == "W_enc", wanted == "b_enc")


def test_the_input_is_data():
    s = random_selection(3, 5, 0.5, seed=3)
    x, W_enc, b_enc = (t.requires_grad_() for t in (randn(3, 4, seed=1), randn(5, 4, seed=2), randn(5, seed=3)))
    for backend in ("torch", "dense"):
        ops.sparse_encode(x, W_enc, b_enc, ops.encoder_scores(x, W_enc, b_enc), s, backend=backend).sum().backward()
    assert x.grad is None and W_enc.grad is not None


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_repeats_are_bit_identical(backend):
    s = random_selection(16, 12, 0.6, seed=4)
    x = randn(16, 24, seed=5, dtype=torch.float32)
    W_enc = randn(12, 24, seed=6, dtype=torch.float32).requires_grad_()
    b_enc = randn(12, seed=7, dtype=torch.float32).requires_grad_()

    def gradients():
        pre = ops.encoder_scores(x, W_enc, b_enc)
        values = ops.sparse_encode(x, W_enc, b_enc, pre, fresh(s), backend=backend)
        return torch.autograd.grad(values.square().sum(), (W_enc, b_enc))

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_as_one_graph_with_decode(backend):
    s = random_selection(5, 12, 0.4, seed=7)
    x = randn(5, 6, seed=1, dtype=torch.float32)
    W_enc, W_dec = (randn(12, 6, seed=i, dtype=torch.float32).requires_grad_() for i in (2, 3))
    b_enc = randn(12, seed=4, dtype=torch.float32).requires_grad_()

    def loss(s, W_enc, b_enc, W_dec):
        pre = ops.encoder_scores(x, W_enc, b_enc, backend=backend)
        values = ops.sparse_encode(x, W_enc, b_enc, pre, s, backend=backend)
        return (ops.sparse_decode(values, s, W_dec, backend=backend) - x).square().sum()

    weights = (W_enc, b_enc, W_dec)
    want = torch.autograd.grad(loss(s, *weights), weights)
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(fresh(s), *weights), weights)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_the_registration_is_sound():
    s = random_selection(3, 5, 0.5, seed=9)
    x, W_enc, b_enc = randn(3, 4, seed=1), randn(5, 4, seed=2).requires_grad_(), randn(5, seed=3).requires_grad_()
    pre = reference.encoder_scores(x, W_enc, b_enc).detach()
    arguments = (x, W_enc, b_enc, pre, s.col, s.row, *s.by_latent, "torch")
    torch.library.opcheck(torch.ops.fastdiff.sparse_encode.default, arguments)
