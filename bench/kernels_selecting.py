"""Kernels up to the selection: input, scores, group maxima, TopK, BatchTopK, thresholds. See bench_kernels.py."""

import kernel_rivals
import torch
from kernel_case import Cost, Measure, relative

from fastdiff.benchmark.shapes import Shape
from fastdiff.kernels import ops
from fastdiff.kernels.above import AboveWork, above_slots
from fastdiff.kernels.group_max import group_max
from fastdiff.kernels.slots import Slots
from fastdiff.kernels.topk import group_size, topk_slots, topk_slots_radix

GROUP = 64


def bench_normalize(m: Measure) -> None:
    c = m.case

    def error() -> float:
        true = (c.batch[c.tokens].double() - c.mean.double()) * c.scale.double()[:, None]
        return relative(
            [
                (c.x[c.tokens], true.flatten(1)),
                (c.x_squares[c.tokens], c.x[c.tokens].double().unflatten(1, c.mean.shape).square().sum(2)),
            ]
        )

    moved = c.batch.nbytes + c.x.nbytes
    m.kernel("normalize", c.normalize, Cost(moved), outputs=[c.x, c.x_squares], error=error, tolerance=6e-3)


def bench_encoder_scores(m: Measure) -> None:
    c, s = m.case, m.case.shape

    def error() -> float:
        true = c.x[c.tokens].double() @ c.W_enc_low[c.latents].double().T
        return relative([(c.scores[c.tokens][:, c.latents], true)])

    cost = Cost(c.x.nbytes + c.W_enc_low.nbytes + c.scores.nbytes, flop=2.0 * s.n_tokens * s.width * s.dict_size)
    m.kernel("encoder_scores", c.encode, cost, outputs=[c.scores], error=error, tolerance=1e-5)


def bench_group_max(m: Measure) -> None:
    c, s = m.case, m.case.shape
    G = -(-s.dict_size // GROUP)
    out = c.empty(s.n_tokens, G)

    def call() -> None:
        group_max(c.scores, c.b_enc, c.code_norm, out, c.limits, c.bad, group=GROUP)

    def error() -> float:
        score = c.score_rows(c.tokens)
        padded = torch.nn.functional.pad(score, (0, G * GROUP - s.dict_size), value=-torch.inf)
        return relative([(out[c.tokens], padded.view(len(c.tokens), G, GROUP).amax(2).double())])

    m.kernel("group_max", call, Cost(c.scores.nbytes + out.nbytes), outputs=[out], error=error, tolerance=0.0)


def bench_topk(m: Measure) -> None:
    c, s = m.case, m.case.shape
    slots, group = Slots.allocate(s.n_tokens, s.k, c.device), group_size(s.k, s.dict_size)
    scored = (c.scores, c.b_enc, c.code_norm)
    maxima = c.empty(s.n_tokens, -(-s.dict_size // (group or GROUP)))

    def call() -> None:
        if group is None:
            topk_slots_radix(*scored, c.limits, c.bad, slots, k_max=s.k)
            return
        group_max(*scored, maxima, c.limits, c.bad, group=group)
        topk_slots(*scored, maxima, c.limits, slots, k_max=s.k, group=group)

    def error() -> float:
        wrong = 0
        for token in c.tokens:
            score = c.score_rows([token])[0]
            best = score.topk(s.k)
            found = slots.col[int(slots.start[token]) : int(slots.end[token])].long()
            true = best.indices[best.values > 0].sort().values
            # ties could be taken in another order by torch; scores cannot differ
            same = len(found) == len(true) and torch.equal(score[found].sort().values, score[true].sort().values)
            wrong += not (same and bool((found.diff() > 0).all()))
        return float(wrong)

    cost = Cost(c.scores.nbytes + _selection_bytes(s))
    # rows and values of unused slots are undefined
    m.kernel("topk", call, cost, outputs=[slots.start, slots.end, slots.col], error=error, tolerance=0.0)
    kernel_rivals.topk(m, cost)


def bench_batchtopk(m: Measure) -> None:
    c, s = m.case, m.case.shape
    slots = c.slots

    def error() -> float:
        lowest, above, reaching = float(c.lowest), 0, 0
        for at in range(0, s.n_tokens, 256):
            score = c.score_rows(slice(at, at + 256))
            above, reaching = above + int((score > lowest).sum()), reaching + int((score >= lowest).sum())
        wrong = 0 if above < s.n_pairs <= reaching and int(slots.end.max()) == s.n_pairs else 1
        for token in c.tokens:
            found, score = c.row(token)[0], c.score_rows([token])[0]
            must, may = (score > lowest).nonzero().squeeze(1), (score >= lowest).nonzero().squeeze(1)
            wrong += not (bool(torch.isin(must, found).all()) and bool(torch.isin(found, may).all()))
        return float(wrong)

    cost = Cost(c.scores.nbytes + _selection_bytes(s))
    outputs = [slots.start, slots.end, slots.col, slots.row, slots.val, c.lowest]
    m.kernel("batchtopk", c.batchtopk, cost, outputs=outputs, error=error, tolerance=0.0)
    kernel_rivals.batchtopk(m, cost)


def bench_above(m: Measure) -> None:
    c, s = m.case, m.case.shape
    work, slots = AboveWork.allocate(s.n_tokens, s.dict_size, c.device), Slots.allocate(s.n_tokens, 2 * s.k, c.device)
    threshold, total = c.lowest.expand(s.dict_size).contiguous(), torch.zeros(1, dtype=torch.int64, device=c.device)

    def call() -> None:
        above_slots(c.scores, c.b_enc, c.code_norm, threshold, work, c.limits, c.bad, slots, total)

    def error() -> float:
        wrong = 0
        for token in c.tokens:
            true = (c.score_rows([token])[0] > threshold).nonzero().squeeze(1)
            wrong += not torch.equal(slots.col[int(slots.start[token]) : int(slots.end[token])].long(), true)
        return float(wrong)

    cost = Cost(c.scores.nbytes + 12 * s.n_pairs)
    m.kernel("above", call, cost, outputs=[slots.start, slots.end, slots.col, total], error=error, tolerance=0.0)


def bench_jumprelu(m: Measure) -> None:
    c = m.case
    z = c.slots.val.clone().requires_grad_()
    theta = (c.slots.val + 0.1 * torch.randn_like(c.slots.val)).clamp(min=0.01).requires_grad_()
    d_z, d_theta, bandwidth = torch.empty_like(z), torch.empty_like(z), 0.3

    def call() -> None:
        f = ops.jumprelu(z, theta, bandwidth, backend="triton")
        for output, gradient in zip((d_z, d_theta), torch.autograd.grad(f, (z, theta), f.detach()), strict=True):
            output.copy_(gradient)

    def error() -> float:
        zd, td = z.detach().double(), theta.detach().double()
        fd = zd * (zd > td)
        inside = (zd - td).abs() < bandwidth / 2
        return relative([(d_z, fd * (zd > td)), (d_theta, -fd * td / bandwidth * inside)])

    m.kernel(
        "jumprelu and gradients",
        call,
        Cost(10 * z.nbytes),
        outputs=[d_z, d_theta],
        error=error,
        tolerance=1e-6,
        graph=False,
    )


def _selection_bytes(s: Shape) -> float:
    """Maxima written and read, the groups that may hold winners, the slots."""
    return 8.0 * s.n_tokens * s.dict_size / GROUP + 4.0 * s.n_tokens * min(s.k * GROUP, s.dict_size) + 12 * s.n_pairs
