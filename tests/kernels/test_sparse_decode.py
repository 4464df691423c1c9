"""Sparse decode against the dense product: values and every gradient."""

import pytest
import torch
from pairs import CASES, DEVICE, assert_no_worse, fresh, randn, random_selection

from fastdiff.kernels import ops, reference

pytestmark = pytest.mark.gpu


def dense(values, s, W_dec):
    f = values.new_zeros(s.n_tokens, s.dict_size).index_put((s.row, s.col), values)
    return reference.sparse_decode(f, W_dec)


@pytest.mark.parametrize("backend", ["torch", "triton", "dense"])
@pytest.mark.parametrize(("B", "F", "C", "density"), [*CASES, (4, 6, 5, -1.0)])
def test_is_the_dense_product_in_float64(backend, B, F, C, density):
    s = random_selection(B, F, density, seed=B)
    values, W_dec = randn(len(s.col), seed=1).requires_grad_(), randn(F, C, seed=2).requires_grad_()
    d_out = randn(B, C, seed=3)
    got, want = ops.sparse_decode(values, s, W_dec, backend=backend), dense(values, s, W_dec)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(out, (values, W_dec), d_out) for out in (got, want))
    for got_grad, want_grad in zip(*gradients, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_no_worse_than_plain_low_precision(backend, dtype):
    s = random_selection(9, 40, 0.3, seed=4)
    values = randn(len(s.col), seed=1, dtype=dtype).float().requires_grad_()
    W_dec = randn(40, 35, seed=2, dtype=dtype).requires_grad_()
    d_out = randn(9, 35, seed=3, dtype=dtype)

    def results(decode, to):
        v, W = values.detach().to(to).requires_grad_(), W_dec.detach().to(to).requires_grad_()
        out = decode(v, s, W)
        return out, *torch.autograd.grad(out, (v, W), d_out.to(to))

    got = ops.sparse_decode(values, s, W_dec, backend=backend)
    got = got, *torch.autograd.grad(got, (values, W_dec), d_out)
    assert [t.dtype for t in got] == [dtype, torch.float32, dtype]
    for mine, plain, truth in zip(got, results(dense, dtype), results(dense, torch.float64), strict=True):
        assert_no_worse(mine.detach(), plain.detach(), truth.detach(), tol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("wanted", ["values", "W_dec"])
def test_only_the_asked_gradient_is_computed(backend, wanted, monkeypatch):
    from fastdiff.kernels import sparse_decode as module

    calls = []
    for name in ("dots", "weighted_rows"):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, op=op, name=name: calls.append(name) or op(*a))
    s = random_selection(6, 20, 0.2, seed=3)
    tensors = {"values": randn(len(s.col), seed=1), "W_dec": randn(20, 4, seed=2)}
    tensors[wanted].requires_grad_()
    out = ops.sparse_decode(tensors["values"], s, tensors["W_dec"], backend=backend)
    calls.clear()
    out.sum().backward()
    assert calls == ["dots" if wanted == "values" else "weighted_rows"]
    assert [name for name, t in tensors.items() if t.grad is not None] == [wanted]
    assert ("by_latent" in vars(s)) == (wanted == "W_dec")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_repeats_are_bit_identical(backend):
    s = random_selection(16, 30, 0.3, seed=4)
    values = randn(len(s.col), seed=5, dtype=torch.float32).requires_grad_()
    W_dec = randn(30, 24, seed=6, dtype=torch.float32).requires_grad_()

    def gradients():
        out = ops.sparse_decode(values, fresh(s), W_dec, backend=backend)
        return torch.autograd.grad(out.square().sum(), (values, W_dec))

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_as_one_graph(backend):
    s = random_selection(5, 12, 0.4, seed=7)
    W_dec = randn(12, 6, seed=1, dtype=torch.float32).requires_grad_()
    values = randn(len(s.col), seed=2, dtype=torch.float32).requires_grad_()

    def loss(values, s, W_dec):
        return ops.sparse_decode(values * 2, s, W_dec, backend=backend).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    want = torch.autograd.grad(loss(values, s, W_dec), (values, W_dec))
    got = torch.autograd.grad(compiled(values, fresh(s), W_dec), (values, W_dec))
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_gradient_of_an_expanded_output():
    s = random_selection(4, 6, 0.5, seed=8)
    values, W_dec = randn(len(s.col), seed=1).requires_grad_(), randn(6, 3, seed=2).requires_grad_()
    d_out = torch.ones((), dtype=torch.float64, device=DEVICE).expand(4, 3)  # what sum() sends back has stride 0
    got = torch.autograd.grad(ops.sparse_decode(values, s, W_dec, backend="triton"), (values, W_dec), d_out)
    want = torch.autograd.grad(dense(values, s, W_dec), (values, W_dec), d_out)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_registration_is_sound(backend):
    s = random_selection(3, 5, 0.5, seed=9)
    values = randn(len(s.col), seed=1).requires_grad_()
    W_dec = randn(5, 4, seed=2).requires_grad_()
    arguments = (values, W_dec, s.crow, s.col, *s.by_latent, backend)
    torch.library.opcheck(torch.ops.fastdiff.sparse_decode.default, arguments)
