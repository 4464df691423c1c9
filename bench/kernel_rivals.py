"""Others' code for single operations: torch's own, and sparsify's kernels where its wheel is there."""

import importlib

import torch
from kernel_case import Cost, Measure
from rivals import load_sparsify, sparsify_is_there
from torch.nn import functional

from fastdiff.kernels.selection import Selection


def topk(m: Measure, cost: Cost) -> None:
    score, k = m.case.scores, m.case.shape.k
    m.rival("torch.topk", lambda: torch.topk(score, k, dim=1, sorted=False), cost)


def batchtopk(m: Measure, cost: Cost) -> None:
    flat, n = m.case.scores.flatten(), m.case.shape.n_pairs
    m.rival("torch.topk, flattened", lambda: torch.topk(flat, n, sorted=False), cost)


def decode(m: Measure, cost: Cost, pairs: Selection) -> None:
    c, s = m.case, m.case.shape
    values = c.slots.val.to(c.low)
    m.rival(
        "F.embedding_bag",
        lambda: functional.embedding_bag(
            pairs.col, c.W_dec_low, pairs.crow, mode="sum", per_sample_weights=values, include_last_offset=True
        ),
        cost,
    )
    if c.device.type != "cuda" or not sparsify_is_there():
        return
    load_sparsify(c.device)
    kernels = importlib.import_module("sparsify.xformers")
    # it takes rows of equal length: the same pairs, cut anew
    index, weight = pairs.col.view(s.n_tokens, s.k), values.view(s.n_tokens, s.k)
    m.rival("sparsify embedding_bag, even rows", lambda: kernels.embedding_bag_triton(index, c.W_dec_low, weight), cost)
    # in its step the decoder is float32
    full, wide = c.W_dec, weight.float()
    twice = Cost(cost.moved, cost.gathered * full.element_size() / c.W_dec_low.element_size())
    m.rival("sparsify embedding_bag, fp32", lambda: kernels.embedding_bag_triton(index, full, wide), twice)


def encode(m: Measure, cost: Cost) -> None:
    """sparsify's gradient of the encoder: all products of a pair's gradient and its input, added up by index."""
    c, s = m.case, m.case.shape
    index = c.slots.col.long()
    delta = c.delta.view(s.n_tokens, s.k)

    def gradient() -> None:
        products = (delta.unsqueeze(2) * c.x.float().unsqueeze(1)).flatten(0, 1)
        torch.zeros_like(c.W_enc).index_add_(0, index, products)

    m.rival("index_add_ of products, as sparsify", gradient, cost)


def weight_gradient(m: Measure, cost: Cost) -> None:
    """What autograd does for embedding_bag: a sort, then a dense gradient."""
    c, s = m.case, m.case.shape
    index = c.slots.col.long()
    offsets = torch.cat([c.slots.start[:1], c.slots.end]).long()
    weights = c.W_dec.clone().requires_grad_()
    values = c.slots.val.clone().requires_grad_()
    gradient = c.resid.float()

    def backward() -> None:
        out = functional.embedding_bag(
            index, weights, offsets, mode="sum", per_sample_weights=values, include_last_offset=True
        )
        torch.autograd.grad(out, (weights, values), gradient)

    m.rival("F.embedding_bag and gradients, fp32", backward, Cost(cost.moved, 4 * cost.gathered))
    if c.device.type != "cuda" or not sparsify_is_there():
        return
    load_sparsify(c.device)
    bag = importlib.import_module("sparsify.xformers").xformers_embedding_bag
    rows, even = index.view(s.n_tokens, s.k), values.detach().view(s.n_tokens, s.k).clone().requires_grad_()

    def theirs() -> None:
        torch.autograd.grad(bag(rows, weights, even), (weights, even), gradient)

    if s.k % 8 == 0:
        m.rival("sparsify embedding_bag and gradients, fp32", theirs, Cost(cost.moved, 4 * cost.gathered))


def adam(m: Measure) -> None:
    """torch's optimizers on gradients that are there already; 28 and about 78 bytes per weight."""
    c = m.case
    for name, options, n_bytes in (
        ("torch Adam, fused", {"fused": True}, 28),
        ("torch Adam, foreach", {"foreach": True}, 78),
    ):
        try:
            parameters = [torch.nn.Parameter(w.clone()) for w in (c.W_dec, c.W_enc)]
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer = torch.optim.Adam(parameters, lr=1e-6, **options)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        m.rival(name, optimizer.step, Cost(float(n_bytes * c.shape.n_weights)))
        del parameters, optimizer
