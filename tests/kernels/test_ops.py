"""What every public op refuses, and that all backends train alike."""

import pytest
import torch
from pairs import DEVICE, randn, random_selection

from fastdiff.kernels import ops

pytestmark = pytest.mark.gpu

S = random_selection(6, 20, 0.2, seed=3)
N = len(S.col)


def ones(*shape: int, **options) -> torch.Tensor:
    return torch.ones(shape, device=DEVICE, **options)


# every op on tensors that fit, with what the test changes
CALLS = {
    "encoder_scores": lambda **o: ops.encoder_scores(ones(6, 4), ones(20, 4), ones(20), **o),
    "sparse_encode": lambda **o: ops.sparse_encode(ones(6, 4), ones(20, 4), ones(20), ones(6, 20), S, **o),
    "sparse_decode": lambda **o: ops.sparse_decode(ones(N), S, ones(20, 4), **o),
    "weighted_rows": lambda **o: ops.weighted_rows(S.col, ones(20, 4), S.crow, ones(N), **o),
    "dots": lambda **o: ops.dots(S, ones(6, 4), ones(20, 4), **o),
    "sum_by_latent": lambda **o: ops.sum_by_latent(S, ones(N), **o),
    "at_entries": lambda **o: ops.at_entries(S, ones(20), **o),
    "jumprelu": lambda **o: ops.jumprelu(ones(N), ones(N), 0.1, **o),
    "step": lambda **o: ops.step(ones(N), ones(N), 0.1, **o),
    "topk": lambda **o: ops.topk(ones(6, 20), 2, **o),
    "batchtopk": lambda **o: ops.batchtopk(ones(6, 20), 2, **o),
    "above": lambda **o: ops.above(ones(6, 20), ones(20), **o),
}


def test_every_public_op_is_tested_here():
    assert {*CALLS, "Selection"} == set(ops.__all__)


@pytest.mark.parametrize("name", CALLS)
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match="auto, triton, torch or dense, got 'fast'"):
        CALLS[name](backend="fast")


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels run on CUDA")
@pytest.mark.parametrize("name", CALLS)
def test_kernels_on_a_cpu_are_refused_without_the_interpreter(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="needs CUDA tensors, got cpu"):
        CALLS[name](backend="triton")
    CALLS[name]()


REFUSED = [
    (lambda: ops.sparse_decode(ones(3), S, ones(20, 4)), rf"nnz={N}\], got \(3,\)"),
    (lambda: ops.sparse_decode(ones(N), S, ones(19, 4)), r"F=20, C\], got \(19, 4\)"),
    (lambda: ops.sparse_decode(ones(N), S, ones(20, 4, dtype=torch.int64)), "W_dec must have a floating dtype"),
    (lambda: ops.sparse_decode(ones(N), S, torch.ones(20, 4, device="meta")), f"values on {DEVICE}.*W_dec on meta"),
    (lambda: ops.sparse_decode(*(torch.ones(n, device="meta") for n in (N,)), S, torch.ones(20, 4, device="meta")),
     f"W_dec on meta, selection on {DEVICE}"),
    (lambda: ops.sparse_decode(ones(N), S, ones(4, 20).T, backend="triton"), r"W_dec contiguous.*strides \(1, 20\)"),
    (lambda: ops.sparse_encode(ones(2, 3), ones(20, 3), ones(20), ones(2, 20), S), r"B=2.*and 6"),
    (lambda: ops.sparse_encode(ones(6, 3), ones(20, 4), ones(20), ones(6, 20), S), r"\(6, 3\), \(20, 4\), \(20,\)"),
    (lambda: ops.sparse_encode(ones(6, 3), ones(19, 3), ones(19), ones(6, 19), S), r"F=19.*and 6, 20"),
    (lambda: ops.sparse_encode(ones(3, 6).T, ones(20, 3), ones(20), ones(6, 20), S, backend="triton"), "x contiguous"),
    (lambda: ops.weighted_rows(S.col, ones(20), S.crow, ones(N)), r"\(20,\)"),
    (lambda: ops.weighted_rows(S.col, ones(20, 4), S.crow, ones(2)), r"\(7,\), \(2,\)"),
    (lambda: ops.weighted_rows(S.col.int(), ones(20, 4), S.crow, ones(N)), "int64, got torch.int32"),
    (lambda: ops.weighted_rows(S.col, torch.ones(20, 4, device="meta"), S.crow, ones(N)), "share a device"),
    (lambda: ops.weighted_rows(S.col, ones(4, 20).T, S.crow, ones(N), backend="triton"), "rows contiguous"),
    (lambda: ops.sum_by_latent(S, ones(3)), r"got \(3,\)"),
    (lambda: ops.at_entries(S, ones(19)), r"F=20\], got \(19,\)"),
    (lambda: ops.above(ones(2, 3), ones(4)), r"\(2, 3\), \(4,\)"),
    (lambda: ops.step(ones(3), ones(3, dtype=torch.int32), 0.1), "theta must have a floating dtype, got torch.int32"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_strided_matrices_are_taken_without_kernels():
    values, W_dec = randn(N, seed=1), randn(4, 20, seed=2).T
    for backend in ("torch", "dense"):
        got = ops.sparse_decode(values, S, W_dec, backend=backend)
        torch.testing.assert_close(got, ops.sparse_decode(values, S, W_dec.contiguous(), backend="dense"))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_jumprelu_step_has_the_dense_gradients(backend):
    x = randn(6, 4, seed=1, dtype=torch.float32)
    weights = [randn(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate([(20, 4), (20,), (20, 4)], 2)]
    theta = ones(20) * 0.3

    def gradients(backend):
        W_enc, b_enc, W_dec, t = (w.detach().requires_grad_() for w in (*weights, theta))
        pre = ops.encoder_scores(x, W_enc, b_enc, backend=backend)
        s = ops.above(pre, (t - 0.2).detach(), backend="torch")
        z, at = (
            ops.sparse_encode(x, W_enc, b_enc, pre, s, backend=backend),
            ops.at_entries(s, t, backend=backend),
        )
        l0 = ops.step(z, at, 0.4, backend=backend).sum()
        out = ops.sparse_decode(ops.jumprelu(z, at, 0.4, backend=backend), s, W_dec, backend=backend)
        return torch.autograd.grad((out - x).square().sum() + l0, (W_enc, b_enc, W_dec, t))

    for got, want in zip(gradients(backend), gradients("dense"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert bool(want.any())
