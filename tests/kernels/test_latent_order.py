import pytest
import torch
from poisoned_slots import poisoned_slots

from fastdiff.kernels.latent_order import LatentOrder, order_by_latent

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def activations(B=9, F=13):
    """Latent 0 never fires, latent 1 always, the others sometimes."""
    generator = torch.Generator().manual_seed(0)
    f = torch.rand(B, F, generator=generator).add(0.1) * (torch.rand(B, F, generator=generator) < 0.3)
    f[:, 0] = 0
    f[:, 1] = torch.arange(1, B + 1)
    return f.to(DEVICE)


def poisoned_order(capacity, dict_size):
    order = LatentOrder.allocate(capacity, dict_size, torch.device(DEVICE))
    for tensor in order:
        tensor.fill_(-7)
    return order


def ordered(parts, F):
    """The order of the concatenated slots, and their columns, rows, values and gradients."""
    col, row, val = (torch.cat([getattr(part, name) for part in parts]) for name in ("col", "row", "val"))
    delta = torch.where(col < F, torch.arange(len(col), device=DEVICE) * 0.5, torch.nan)
    order = poisoned_order(len(col), F)
    order_by_latent(col, row, val, delta, order, _block=32)
    return order, col, row, val, delta


def check(order, col, row, val, delta):
    F = len(order.longest_first)
    expected = [i for j in range(F + 1) for i in range(len(col)) if col[i] == j]
    owned = [i for i in expected if col[i] < F]
    counts = [int((col == j).sum()) for j in range(F)]
    assert order.entry.tolist() == expected
    assert order.start.tolist() == [sum(counts[:j]) for j in range(F + 1)]
    assert order.longest_first.tolist() == sorted(range(F), key=lambda j: -counts[j])
    for got, source in ((order.token, row), (order.val, val), (order.delta, delta)):
        assert torch.equal(got[: len(owned)], source[owned])
        assert not got[len(owned) :].any()


def test_sorts_by_latent_then_slot():
    f = activations()
    check(*ordered([poisoned_slots(f)], f.shape[1]))


def test_micro_batches_follow_each_other():
    f = activations()
    order, *given = ordered([poisoned_slots(f[:4]), poisoned_slots(f[4:], row_offset=4)], f.shape[1])
    check(order, *given)
    start, end = order.start[1:3].tolist()
    assert order.token[start:end].tolist() == list(range(len(f)))


def test_no_pairs_at_all():
    f = torch.zeros(3, 5, device=DEVICE)
    order, *given = ordered([poisoned_slots(f)], 5)
    check(order, *given)
    assert order.longest_first.tolist() == [0, 1, 2, 3, 4]


def test_only_the_last_latent():
    f = torch.zeros(3, 5, device=DEVICE)
    f[1, 4] = 2.0
    check(*ordered([poisoned_slots(f, gap=0)], 5))


def test_repeats_bit_for_bit():
    f = activations()
    one, *_ = ordered([poisoned_slots(f)], f.shape[1])
    two, *_ = ordered([poisoned_slots(f)], f.shape[1])
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_allocates_int32_places():
    order = LatentOrder.allocate(6, 4, torch.device(DEVICE))
    assert [tuple(tensor.shape) for tensor in order] == [(5,), (4,), (6,), (6,), (6,), (6,)]
    assert [tensor.dtype for tensor in order] == [torch.int32] * 4 + [torch.float32] * 2
    assert all(tensor.is_contiguous() for tensor in order)
