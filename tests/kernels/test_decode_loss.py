import pytest
import torch
from poisoned_slots import by_slot, poisoned_slots

from fastdiff.crosscoder import losses
from fastdiff.kernels import reference
from fastdiff.kernels.decode_loss import decode_loss, slices, token_gradients
from fastdiff.kernels.slots import ALL_FINITE

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# rows of each kind: empty, in half a tile of 8, in a whole one, in several
COUNTS = (0, 1, 4, 5, 8, 9, 20)
SMALL = {"_columns": 16}
SHAPES = [(1, 20), (2, 16), (3, 20), (2, 70)]


def problem(M, D, F=23, counts=COUNTS, dtype=torch.float32):
    """f [B, F] with `counts` active latents, W_dec, b_dec, x."""
    generator = torch.Generator().manual_seed(M * D)
    f = torch.zeros(len(counts), F)
    for b, n in enumerate(counts):
        f[b, torch.randperm(F, generator=generator)[:n]] = torch.rand(n, generator=generator) + 0.1
    W_dec, b_dec, x = (torch.randn(*shape, generator=generator) for shape in ((F, M * D), (M * D,), (len(f), M * D)))
    return f.to(DEVICE), W_dec.to(DEVICE, dtype), b_dec.to(DEVICE), x.to(DEVICE, dtype)


def limits(n_valid):
    return torch.tensor([n_valid, 1], dtype=torch.int32, device=DEVICE)


def decode(f, W_dec, b_dec, x, M, n_valid=None):
    """The slots, and r, squares and dots of the kernel."""
    slots, n_slices = poisoned_slots(f), slices(M, x.shape[1] // M, **SMALL)
    resid = torch.empty_like(x)
    squares = torch.empty(len(x), n_slices, device=DEVICE)
    dots = torch.full((n_slices, len(slots.col)), torch.nan, device=DEVICE)
    n_valid = limits(len(x) if n_valid is None else n_valid)
    decode_loss(slots, W_dec, b_dec, x, resid, squares, dots, n_valid, n_models=M, _rows=8, **SMALL)
    return slots, resid, squares, dots


def gradients(slots, squares, dots, M, D, *, loss, n_valid=None, total=10, row_offset=0):
    c, errors = torch.empty(2, len(squares), M, device=DEVICE)
    delta = torch.full((len(slots.col),), torch.nan, device=DEVICE)
    bad = torch.tensor([ALL_FINITE], dtype=torch.int32, device=DEVICE)
    n_valid = limits(len(squares) if n_valid is None else n_valid)
    total = torch.tensor([total], dtype=torch.int32, device=DEVICE)
    given = {"n_models": M, "d_model": D, "loss": loss, "row_offset": row_offset, "_entries": 4, "_at_once": 2}
    token_gradients(slots, squares, dots, n_valid, total, c, errors, delta, bad, **given, **SMALL)
    return c, errors, delta, int(bad)


@pytest.mark.parametrize(("M", "D"), SHAPES)
def test_residual_squares_and_products_are_the_definition(M, D):
    f, W_dec, b_dec, x = problem(M, D)
    slots, resid, squares, dots = decode(f, W_dec, b_dec, x, M)
    r, errors, products = reference.residual(f.double(), W_dec.double(), b_dec.double(), x.double(), M)
    torch.testing.assert_close(resid, r.float(), rtol=0, atol=2e-6)
    torch.testing.assert_close(squares.unflatten(1, (M, -1)).sum(2), errors.float(), rtol=2e-6, atol=0)
    by_model = dots.unflatten(0, (M, -1)).sum(1).T
    torch.testing.assert_close(by_model, by_slot(slots, products).float(), rtol=0, atol=1e-4, equal_nan=True)


def test_bfloat16_is_rounded_once():
    f, W_dec, b_dec, x = problem(2, 20, dtype=torch.bfloat16)
    slots, resid, squares, dots = decode(f, W_dec, b_dec, x, 2)
    r, errors, products = reference.residual(f.double(), W_dec.double(), b_dec.double(), x.double(), 2)
    assert ((resid - r).abs() <= (r.bfloat16() - r).abs() + 4e-6).all()
    # from r as it was before it was stored
    torch.testing.assert_close(squares.unflatten(1, (2, -1)).sum(2), errors.float(), rtol=2e-6, atol=0)
    by_model = dots.unflatten(0, (2, -1)).sum(1).T
    torch.testing.assert_close(by_model, by_slot(slots, products).float(), rtol=0, atol=1e-4, equal_nan=True)


def test_empty_row_leaves_bias_minus_input():
    f, W_dec, b_dec, x = problem(2, 20)
    _, resid, _, _ = decode(f, W_dec, b_dec, x, 2)
    assert torch.equal(resid[0], b_dec - x[0])


def test_tokens_beyond_the_limit_are_zero():
    f, W_dec, b_dec, x = problem(2, 20)
    n_valid = 4
    f[n_valid:] = 0
    x[n_valid:] = torch.nan
    slots, resid, squares, dots = decode(f, W_dec, b_dec, x, 2, n_valid)
    assert not resid[n_valid:].any() and not squares[n_valid:].any()
    c, errors, delta, bad = gradients(slots, squares, dots, 2, 20, loss="mse", n_valid=n_valid)
    assert not c[n_valid:].any() and not errors[n_valid:].any() and (c[:n_valid] > 0).all()
    assert bad == ALL_FINITE and delta.isfinite().all()


@pytest.mark.parametrize("loss", ["l2norm", "mse"])
@pytest.mark.parametrize(("M", "D"), SHAPES)
def test_gradients_are_those_of_the_loss(M, D, loss):
    f, W_dec, b_dec, x = problem(M, D)
    slots, resid, squares, dots = decode(f, W_dec, b_dec, x, M)
    c, errors, delta, bad = gradients(slots, squares, dots, M, D, loss=loss, total=len(x))
    f, b_dec = f.double().requires_grad_(), b_dec.double().requires_grad_()
    r, _, _ = reference.residual(f, W_dec.double(), b_dec, x.double(), M)
    r.retain_grad()
    losses.reconstruction(r.unflatten(1, (M, D)), loss).backward()
    scaled = (c[:, :, None] * resid.unflatten(1, (M, D))).flatten(1)
    torch.testing.assert_close(scaled, r.grad.float(), rtol=2e-5, atol=1e-7)
    expected = by_slot(slots, f.grad).float().nan_to_num(0.0)
    torch.testing.assert_close(delta, expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(errors, r.detach().unflatten(1, (M, D)).square().sum(2).float(), rtol=2e-6, atol=0)
    torch.testing.assert_close(c, reference.residual_scale(errors.double(), len(x), D, loss).float())
    assert bad == ALL_FINITE


@pytest.mark.parametrize("loss", ["l2norm", "mse"])
def test_scale_counts_the_tokens_of_the_whole_step(loss):
    f, W_dec, b_dec, x = problem(2, 20)
    slots, _, squares, dots = decode(f, W_dec, b_dec, x, 2)
    one, _, delta_one, _ = gradients(slots, squares, dots, 2, 20, loss=loss, total=8)
    two, _, delta_two, _ = gradients(slots, squares, dots, 2, 20, loss=loss, total=16)
    assert torch.equal(one, 2 * two) and torch.equal(delta_one, 2 * delta_two)


def test_zero_residual_has_no_gradient():
    f, W_dec, b_dec, x = problem(2, 20)
    x[0] = b_dec
    x[0, 20:] += 1
    slots, resid, squares, dots = decode(f, W_dec, b_dec, x, 2)
    c, errors, delta, bad = gradients(slots, squares, dots, 2, 20, loss="l2norm")
    assert not resid[0, :20].any()
    assert c[0, 0] == 0 and errors[0, 0] == 0 and c[0, 1] > 0
    assert delta.isfinite().all() and bad == ALL_FINITE


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_reports_the_first_token_that_is_not_finite(value):
    f, W_dec, b_dec, x = problem(2, 20)
    x[5, 39] = x[3, 0] = value
    slots, _, squares, dots = decode(f, W_dec, b_dec, x, 2)
    *_, bad = gradients(slots, squares, dots, 2, 20, loss="l2norm", row_offset=50)
    assert bad == 53


def test_reports_a_gradient_that_is_not_finite():
    f, W_dec, b_dec, x = problem(2, 20)
    slots, _, squares, dots = decode(f, W_dec, b_dec, x, 2)
    dots[1, slots.start[6]] = torch.inf
    *_, bad = gradients(slots, squares, dots, 2, 20, loss="mse")
    assert bad == 6


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="l2norm or mse, got 'l1'"):
        gradients(poisoned_slots(torch.ones(1, 1)), torch.ones(1, 1), torch.ones(1, 5), 1, 16, loss="l1")


def test_repeats_bit_for_bit():
    f, W_dec, b_dec, x = problem(3, 20)
    runs = []
    for _ in range(2):
        slots, resid, squares, dots = decode(f, W_dec, b_dec, x, 3)
        c, _, delta, _ = gradients(slots, squares, dots, 3, 20, loss="l2norm")
        runs.append((resid, squares, dots.nan_to_num(7.0), c, delta))
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
