"""Kernels after the selection: decoding, gradients, sums, order, Adam, AuxK. See bench_kernels.py."""

import kernel_rivals
import torch
from kernel_case import Case, Cost, Measure, relative
from torch import Tensor

from fastdiff.benchmark.floor import state_bytes
from fastdiff.kernels import ops
from fastdiff.kernels.auxk import DeadLatents
from fastdiff.kernels.column_sums import column_sums
from fastdiff.kernels.fused_adam import RowState, adam_rates, update_rows
from fastdiff.kernels.latent_order import LatentOrder
from fastdiff.kernels.row_gradients import norm_rows, row_slices
from fastdiff.kernels.selection import Selection
from fastdiff.kernels.weighted_rows import weighted_rows_into


def bench_sparse_decode(m: Measure) -> None:
    c, s = m.case, m.case.shape
    pairs = _selection(c)
    values, out = c.slots.val.to(c.low), c.empty(s.n_tokens, s.width, dtype=c.low)

    def call() -> None:
        out.copy_(ops.sparse_decode(values, pairs, c.W_dec_low, backend="triton"))

    def error() -> float:
        found = []
        for token in c.tokens:
            at = slice(int(pairs.crow[token]), int(pairs.crow[token + 1]))
            found.append((out[token], values[at].double() @ c.W_dec_low[pairs.col[at]].double()))
        return relative(found)

    cost = Cost(out.nbytes, _gathered(c))
    m.kernel("sparse_decode", call, cost, outputs=[out], error=error, tolerance=8e-3)
    kernel_rivals.decode(m, cost, pairs)


def bench_sparse_encode(m: Measure) -> None:
    c = m.case
    pairs = _selection(c)
    pairs.by_latent  # noqa: B018  built once per step, timed as latent_order
    W = c.W_enc_low.clone().requires_grad_()
    b = c.b_enc.clone().requires_grad_()
    d_values = c.delta.clone()
    d_W, d_b = torch.empty_like(W), torch.empty_like(b)

    def call() -> None:
        values = ops.sparse_encode(c.x, W, b, c.scores, pairs, backend="triton")
        for output, gradient in zip((d_W, d_b), torch.autograd.grad(values, (W, b), d_values), strict=True):
            output.copy_(gradient)

    def error() -> float:
        return relative([(d_W[j], c.column(j)[2] @ c.x[c.column(j)[0]].double()) for j in c.latents])

    cost = Cost(2 * d_W.nbytes, _gathered(c))
    m.kernel("sparse_encode and gradients", call, cost, outputs=[d_W, d_b], error=error, tolerance=8e-3, graph=False)
    kernel_rivals.encode(m, cost)


def bench_weighted_rows(m: Measure) -> None:
    c, o = m.case, m.case.order
    out = torch.empty_like(c.W_dec)

    def call() -> None:
        weighted_rows_into(o.token, c.resid, o.start, o.val, out)

    def error() -> float:
        return relative([(out[j], c.column(j)[1] @ c.resid[c.column(j)[0]].double()) for j in c.latents])

    cost = Cost(out.nbytes + c.resid.nbytes, _gathered(c))
    m.kernel("weighted_rows", call, cost, outputs=[out], error=error, tolerance=1e-5)
    kernel_rivals.weight_gradient(m, cost)


def bench_decode_loss(m: Measure) -> None:
    c, s = m.case, m.case.shape

    def error() -> float:
        found = []
        for token in c.tokens:
            col, val = c.row(token)
            rows = c.W_dec_low[col].double()
            r = val @ rows + c.b_dec.double() - c.x[token].double()
            at = slice(int(c.slots.start[token]), int(c.slots.end[token]))
            dots = rows * r
            by_model = c.dots[:, at].double().unflatten(0, (s.n_models, -1)).sum(1)
            found += [(c.resid[token], r), (by_model, dots.unflatten(1, (s.n_models, -1)).sum(2).T)]
        return max(relative([pair]) for pair in found)

    cost = Cost(2 * c.x.nbytes + c.dots.nbytes, _gathered(c))
    m.kernel("decode_loss", c.decode, cost, outputs=[c.resid, c.squares, c.dots], error=error, tolerance=1e-2)


def bench_token_gradients(m: Measure) -> None:
    c, s = m.case, m.case.shape

    def error() -> float:
        found = []
        for token in c.tokens:
            norm = c.squares[token].double().unflatten(0, (s.n_models, -1)).sum(1)
            true = 1 / (s.n_tokens * s.n_models * norm.sqrt())
            at = slice(int(c.slots.start[token]), int(c.slots.end[token]))
            dots = c.dots[:, at].double().unflatten(0, (s.n_models, -1)).sum(1)
            found += [(c.c[token], true), (c.errors[token], norm), (c.delta[at], true @ dots)]
        return max(relative([pair]) for pair in found)

    m.kernel("token_gradients", c.gradients, Cost(c.dots.nbytes + c.delta.nbytes), outputs=[c.c, c.errors, c.delta],
             error=error, tolerance=1e-4)  # fmt: skip


def bench_column_sums(m: Measure) -> None:
    c, s = m.case, m.case.shape
    cols = torch.arange(0, s.width, max(1, s.width // 7), device=c.device)

    def call() -> None:
        column_sums(c.resid, c.x, c.c, c.sums, c.sums_work, c.limits, n_models=s.n_models)

    def error() -> float:
        r, x = c.resid[:, cols].double(), c.x[:, cols].double()
        weight = c.c.double()[:, cols // s.d_model]
        pairs = zip(c.sums[:, cols], (r.sum(0), (weight * r).sum(0), x.sum(0)), strict=True)
        return max(relative([pair]) for pair in pairs)

    m.kernel("column_sums", call, Cost(2 * c.x.nbytes), outputs=[c.sums], error=error, tolerance=1e-3)


def bench_latent_order(m: Measure) -> None:
    c, o = m.case, m.case.order

    def error() -> float:
        latents, slot = c.slots.col.sort(stable=True)
        edges = torch.searchsorted(latents, torch.arange(m.case.shape.dict_size + 1, device=c.device).int())
        same = torch.equal(o.entry.long(), slot) and torch.equal(o.start.long(), edges)
        return 0.0 if same and torch.equal(o.val, c.slots.val[slot]) and torch.equal(o.delta, c.delta[slot]) else 1.0

    cost = Cost(32.0 * len(o.entry))
    outputs = [t for t in LatentOrder(*o) if t.dtype != torch.int32 or len(t) != m.case.shape.dict_size]
    m.kernel("latent_order", c.by_latent, cost, outputs=outputs, error=error, tolerance=0.0)


def bench_norm_rows(m: Measure) -> None:
    c, s = m.case, m.case.shape
    squares = c.empty(s.dict_size, row_slices(s.n_models, s.d_model))

    def call() -> None:
        norm_rows(c.order, c.c, c.resid, c.x, None, squares, n_models=s.n_models)

    def error() -> float:
        found = []
        for j in c.latents:
            g_dec, g_enc, g_bias = _gradients(c, j)
            found.append((squares[j].sum(), g_dec.square().sum() + g_enc.square().sum() + g_bias**2))
        return relative(found)

    cost = Cost(2 * c.x.nbytes, 2 * _gathered(c))
    m.kernel("norm_rows (exact clip)", call, cost, outputs=[squares], error=error, tolerance=1e-4)


def bench_fused_adam(m: Measure) -> None:
    for kind in (torch.float32, torch.bfloat16):
        _bench_fused_adam(m, kind)
    kernel_rivals.adam(m)


def _bench_fused_adam(m: Measure, kind: torch.dtype) -> None:
    c, s = m.case, m.case.shape
    shadows = (c.W_dec_low, c.W_enc_low) if c.low == torch.bfloat16 else (None, None)
    zeros = [torch.zeros_like(c.W_dec, dtype=kind) for _ in range(4)]
    state = RowState(
        c.W_dec,
        *zeros[:2],
        shadows[0],
        c.W_enc,
        *zeros[2:],
        shadows[1],
        c.b_enc,
        *torch.zeros(2, s.dict_size, device=c.device),
    )
    rates = torch.tensor(adam_rates(1e-3, (0.9, 0.999), 1), device=c.device)
    counter, scale = torch.zeros(1, dtype=torch.int64, device=c.device), torch.full((1,), 0.5, device=c.device)
    norms = c.empty(s.dict_size, row_slices(s.n_models, s.d_model), s.n_models)
    before = [c.W_dec.clone(), c.W_enc.clone(), c.b_enc.clone()]
    moments = [state.W_dec_m, state.W_dec_v, state.W_enc_m, state.W_enc_v, state.b_enc_m, state.b_enc_v]

    def restore() -> None:
        for tensor, saved in zip((c.W_dec, c.W_enc, c.b_enc), before, strict=True):
            tensor.copy_(saved)
        for moment in moments:
            moment.zero_()
        norms.fill_(float("nan"))

    def call() -> None:
        inputs = (c.order, c.c, c.resid, c.x, state, None, rates, scale, counter, c.bad, norms, None)
        update_rows(*inputs, n_models=s.n_models, betas=(0.9, 0.999), eps=1e-8, seed=0)

    def error() -> float:
        found = []
        for j in c.latents:
            for weights, old, gradient in zip((c.W_dec, c.W_enc), before, _gradients(c, j), strict=False):
                g = 0.5 * gradient
                # the first step: m / (1 - β1) is g, v / (1 - β2) is g²
                found.append((weights[j].double() - old[j].double(), -1e-3 * g / (g.abs() + 1e-8)))
        return relative(found)

    moved = s.n_weights * state_bytes(moments=str(kind).removeprefix("torch."), shadow=shadows[0] is not None)
    cost = Cost(moved + 2 * c.x.nbytes, 2 * _gathered(c))
    outputs = [c.W_dec, c.W_enc, c.b_enc, *moments, norms]
    # a weight of 1 holds a change of 1e-3 to 6e-5 of it; signs of gradients near zero hang on the order of summing
    name = "fused_adam" if kind == torch.float32 else "fused_adam, bf16 moments"
    m.kernel(name, call, cost, outputs=outputs, error=error, tolerance=1e-3, restore=restore)
    restore()
    if shadows[0] is not None:
        c.W_dec_low.copy_(c.W_dec)
        c.W_enc_low.copy_(c.W_enc)


def bench_auxk(m: Measure) -> None:
    c, s = m.case, m.case.shape
    n = max(1, round(0.3 * s.dict_size))
    fires = c.order.start.diff() > 0
    # the least frequent latents
    dead = torch.zeros(s.dict_size, dtype=torch.bool, device=c.device)
    dead[fires.int().argsort(stable=True)[:n]] = True
    lists = DeadLatents.allocate(n, s.n_tokens, s.dict_size, s.width, c.low, c.device)
    true = c.resid.double().square().sum() / s.n_tokens - (c.resid.double().sum(0) / s.n_tokens).square().sum()
    k = s.d_model // 2

    def call() -> None:
        lists.collect(dead, c.W_dec_low)
        lists.add_gradients(
            c.x, c.resid, c.scores, c.W_enc_low, c.b_enc, c.code_norm, spread=true, n_valid=c.limits[0],
            n_total=c.total[0], coef=1 / 32, k=k,
        )  # fmt: skip

    def error() -> float:
        which = dead.nonzero().squeeze(1)
        u, f = _auxk_residual(c, which, k, float(true))
        # the one that is most active among the dead
        j = int(f.sum(0).argmax())
        d_pre = (u @ c.W_dec_low[which[j]].double()) * (f[:, j] > 0)
        rows = lists.rows
        pairs = ((rows.dec[j], f[:, j] @ u), (rows.enc[j], d_pre @ c.x.double()), (rows.bias[j], d_pre.sum()))
        return max(relative([pair]) for pair in pairs)

    cost = Cost(flop=8.0 * s.n_tokens * s.width * n)
    outputs = [lists.rows.dec, lists.rows.enc, lists.rows.bias]
    tolerance = 3e-2 if c.low == torch.bfloat16 else 1e-4
    m.kernel("auxk (30 % dead)", call, cost, outputs=outputs, error=error, tolerance=tolerance, graph=False)


def _auxk_residual(c: Case, which: Tensor, k: int, spread: float) -> tuple[Tensor, Tensor]:
    """Gradient of AuxK by its reconstruction, [B, C], and the dead latents' activations, [B, n]."""
    f = (c.scores[:, which] + c.b_enc[which]).relu()
    if k < len(which):
        chosen = (f * c.code_norm[which]).topk(k, dim=1, sorted=False).indices
        f = f * torch.zeros_like(f).scatter_(1, chosen, 1.0)
    miss = torch.addmm(c.resid.float(), f, c.W_dec_low[which].float()).double()
    return miss * (2 / 32 / (len(f) * spread)), f.double()


def _gradients(c: Case, latent: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decoder row, encoder row and bias of the loss's gradient, in float64."""
    token, val, delta = c.column(latent)
    weight = c.c[token].double().repeat_interleave(c.shape.d_model, dim=1)
    return val @ (weight * c.resid[token].double()), delta @ c.x[token].double(), delta.sum()


def _selection(c: Case) -> Selection:
    """The step's pairs as the functional ops take them."""
    crow = torch.cat([c.slots.start[:1], c.slots.end]).long()
    return Selection(crow, c.slots.col.long(), c.slots.row.long(), c.shape.dict_size)


def _gathered(c: Case) -> float:
    return float(c.shape.n_pairs * c.shape.width * c.x.element_size())
