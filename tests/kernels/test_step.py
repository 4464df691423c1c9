"""Whole fused steps, on both implementations, against autograd on dense products with torch's own clip and Adam."""

import pytest
import torch
from dense_step import NAMES, DenseStep, make_batches, make_settings, make_tensors

from fastdiff.kernels.step import NotFinite, StepRates, StepTensors
from fastdiff.kernels.torch_step import TorchStep
from fastdiff.kernels.triton_step import TritonStep, places

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = [TorchStep, TritonStep]

# steps, (F, M, D), settings; a slice has 64 columns. One interpreted step takes a second, so most have three
CASES = {
    "batchtopk": (6, (26, 2, 12), {}),
    "three_models_mse": (6, (23, 3, 70), {"loss": "mse", "clip": 1.0}),
    "one_model_topk": (6, (26, 1, 13), {"selection": "topk", "clip": 0.3}),
    "previous": (4, (26, 2, 12), {"clip_mode": "previous", "clip": 0.4}),
    "micro_batches": (4, (26, 2, 12), {"n_tokens": 6, "n_micro": 2, "k_max": 7}),
    "three_micro_batches": (3, (17, 2, 10), {"n_tokens": 4, "n_micro": 3, "selection": "topk", "k_max": 7}),
    "mse": (3, (26, 2, 12), {"loss": "mse"}),
    "no_auxk": (3, (26, 2, 12), {"auxk_coef": 0.0}),
    "no_clip": (3, (26, 2, 12), {"clip": 0.0}),
}


def rates(number: int, k: int = 4) -> StepRates:
    return StepRates(number=number, k=k, lr=2e-3 * (number + 1), threshold_memory=number / (number + 9))


def run(kind, settings, n_steps: int, size=(26, 2, 12)):
    """Steps of a fused step and of the oracle; the last batch is short."""
    F, M, D = size
    tensors = make_tensors(F, M, D, device=DEVICE)
    oracle = DenseStep(settings, tensors)
    step = kind(settings, tensors)
    for number, batch in enumerate(make_batches(n_steps, settings.max_tokens, M, D)):
        batch = batch[: settings.max_tokens - 5] if number == n_steps - 1 else batch
        now = rates(number, 5 - number // 3)
        step.step(batch.to(DEVICE), now)
        oracle.step(batch, now)
    assert step.not_finite() is None
    return step, tensors, oracle


def assert_equal(step, tensors, oracle, tolerance: float) -> None:
    for name in NAMES:
        got, want = getattr(tensors, name).cpu().double(), oracle.parameters[name].detach()
        assert float((got - want).norm() / want.norm()) <= tolerance, name
        for i, key in enumerate(("exp_avg", "exp_avg_sq")):
            moment = oracle.adam.state[oracle.parameters[name]][key]
            assert float((tensors.moments[name][i].cpu().double() - moment).norm() / moment.norm()) <= 20 * tolerance
    assert torch.equal(tensors.tokens_since_fired.cpu(), oracle.since_fired)
    figures = step.figures()
    assert figures.loss == pytest.approx(sum(oracle.losses), rel=1e-5)
    assert figures.n_active == oracle.n_active
    assert figures.n_dead == int((oracle.since_fired >= step.settings.dead_tokens).sum())
    torch.testing.assert_close(figures.squared_error, oracle.squared_error, rtol=1e-5, atol=0)
    if step.settings.selection == "batchtopk":
        assert float(tensors.threshold[0]) == pytest.approx(oracle.threshold, rel=1e-5)
        assert len(tensors.threshold.unique()) == 1


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("case", CASES)
def test_steps_equal_autograd(kind, case):
    n_steps, size, changed = CASES[case]
    settings = make_settings(**changed)
    step, tensors, oracle = run(kind, settings, n_steps, size)
    assert oracle.aux_steps >= n_steps // 2 or settings.auxk_coef == 0, "the comparison must cover AuxK"
    assert oracle.clipped_steps == (n_steps if 0 < settings.clip < 100 else 0)
    assert_equal(step, tensors, oracle, 1e-6)


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_stops_the_weights_and_is_named(kind, bad):
    tensors = make_tensors(device=DEVICE)
    step = kind(make_settings(), tensors)
    batches = make_batches(4, 12, device=DEVICE)
    for number in range(2):
        step.step(batches[number], rates(number))
    before = [
        t.clone() for t in (*tensors[:4], *tensors.moments["W_dec"], tensors.threshold, tensors.tokens_since_fired)
    ]
    batches[2][7, 1, 3] = bad
    batches[2][9, 0, 0] = bad
    for number in (2, 3):
        step.step(batches[number], rates(number))
        step.wait()
        assert step.not_finite() == NotFinite(2, 7)
    after = [*tensors[:4], *tensors.moments["W_dec"], tensors.threshold, tensors.tokens_since_fired]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert step.figures().n_steps == 2


@pytest.mark.parametrize("kind", STEPS)
def test_a_score_that_is_not_finite_stops_although_it_is_never_selected(kind):
    tensors = make_tensors(device=DEVICE)
    tensors.W_enc[3] = 1e37  # overflows where activations are about 100; below zero where they are -1
    before = tensors.W_dec.clone()
    step = kind(make_settings(), tensors)
    batch = make_batches(1, 12, device=DEVICE)[0].abs() * 100
    batch[:5] = -1
    step.step(batch, rates(0))
    step.wait()
    assert step.not_finite() == NotFinite(0, 5)
    assert torch.equal(tensors.W_dec, before)


@pytest.mark.parametrize("changed", [{"clip_mode": "previous"}, {"clip": 0.0}], ids=str)
@pytest.mark.parametrize("kind", STEPS)
def test_a_gradient_that_would_overflow_is_not_applied_without_its_norm(kind, changed):
    tensors = make_tensors(device=DEVICE)
    step = kind(make_settings(loss="mse", **changed), tensors)
    batches = make_batches(3, 12, device=DEVICE)
    step.step(batches[0], rates(0))
    before = [t.clone() for t in (*tensors[:4], *tensors.moments["W_dec"], *tensors.moments["W_enc"])]
    step.step(batches[1] * 1e18, rates(1))
    step.step(batches[2], rates(2))
    step.wait()
    assert step.not_finite() is not None and step.not_finite().step == 1
    after = [*tensors[:4], *tensors.moments["W_dec"], *tensors.moments["W_enc"]]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_continues_from_the_state_of_another_to_the_same_bits(kind):
    settings, batches = make_settings(clip_mode="previous", clip=0.3), make_batches(3, 12, device=DEVICE)
    first = make_tensors(device=DEVICE)
    step = kind(settings, first)
    for number in range(2):
        step.step(batches[number], rates(number))
    second = StepTensors(
        *(t.clone() for t in first[:4]),
        {name: (m.clone(), v.clone()) for name, (m, v) in first.moments.items()},
        *(t.clone() for t in first[5:]),
    )
    other = kind(settings, second)
    other.load_state({name: t.clone() for name, t in step.state().items()})
    for each in (step, other):
        each.step(batches[2], rates(2))
    for a, b in zip((*first[:4], *first[5:]), (*second[:4], *second[5:]), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(step.state().values(), other.state().values(), strict=True))


@pytest.mark.parametrize("kind", STEPS)
def test_a_gradient_that_is_not_finite_is_not_applied(kind):
    tensors = make_tensors(device=DEVICE)
    # finite errors, but an activation whose product with them is beyond float32
    tensors.W_enc[:, 0, :] *= 3e18
    tensors.W_dec[:, 0, :] *= 1e19
    before = tensors.W_dec.clone()
    step = kind(make_settings(loss="mse"), tensors)
    step.step(make_batches(1, 12, device=DEVICE)[0], rates(0))
    step.wait()
    assert step.not_finite() is not None and step.not_finite().step == 0
    assert torch.equal(tensors.W_dec, before)


@pytest.mark.parametrize("kind", STEPS)
def test_steps_repeat_bit_for_bit(kind):
    first, second = (run(kind, make_settings(clip=0.3), 3)[1] for _ in range(2))
    for name in NAMES:
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("kind", STEPS)
def test_a_batch_that_does_not_fit_is_refused(kind):
    step = kind(make_settings(), make_tensors(device=DEVICE))
    for batch, message in (
        (torch.zeros(13, 2, 12), r"1 to 12 tokens, M=2, D=12\], got \(13, 2, 12\)"),
        (torch.zeros(12, 2, 11), r"got \(12, 2, 11\)"),
        (torch.zeros(12, 24), r"got \(12, 24\)"),
        (torch.zeros(12, 2, 12, dtype=torch.float64), "got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            step.step(batch.to(DEVICE), rates(0))


@pytest.mark.parametrize("kind", STEPS)
def test_a_k_out_of_range_is_refused(kind):
    with pytest.raises(ValueError, match=r"\[1, F=26\], got 27"):
        kind(make_settings(k_max=27), make_tensors(device=DEVICE))
    step = kind(make_settings(), make_tensors(device=DEVICE))
    for k in (0, 6):
        with pytest.raises(ValueError, match=rf"\[1, k_max=5\], got {k}"):
            step.step(make_batches(1, 12, device=DEVICE)[0], rates(0, k))


@pytest.mark.parametrize("kind", STEPS)
def test_weights_that_are_not_contiguous_are_refused(kind):
    tensors = make_tensors(device=DEVICE)
    crooked = tensors._replace(W_dec=tensors.W_dec.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ValueError, match="W_dec and its moments must be contiguous"):
        kind(make_settings(), crooked)


def test_torch_refuses_bfloat16_moments():
    with pytest.raises(ValueError, match="moments='bfloat16' needs the triton backend"):
        TorchStep(make_settings(moments="bfloat16"), make_tensors())


def moments_of(step_settings, n_steps=2):
    tensors = make_tensors(device=DEVICE, moments=getattr(torch, step_settings.moments))
    oracle, step = DenseStep(step_settings, tensors), TritonStep(step_settings, tensors)
    for number, batch in enumerate(make_batches(n_steps, 12, device=DEVICE)):
        step.step(batch, rates(number))
        oracle.step(batch, rates(number))
    return tensors, oracle


@pytest.mark.parametrize("changed", [{"precision": "bfloat16"}, {"moments": "bfloat16"}], ids=str)
def test_bfloat16_is_off_by_its_rounding_only(changed):
    tensors, oracle = moments_of(make_settings(loss="mse", **changed))
    for name in NAMES:
        wanted = oracle.adam.state[oracle.parameters[name]]
        for got, key in zip(tensors.moments[name], ("exp_avg", "exp_avg_sq"), strict=True):
            error = got.cpu().double() - wanted[key]
            assert float(error.norm() / wanted[key].norm()) < 0.03, (name, key)


@pytest.mark.parametrize("selection", ["batchtopk", "topk"])
def test_torch_lets_bfloat16_scores_propose_and_float32_pick(selection):
    settings = make_settings(precision="bfloat16", selection=selection)
    step, tensors, oracle = run(TorchStep, settings, 6)
    # equal to the last bits: every pair that float32 selects was among those proposed
    assert_equal(step, tensors, oracle, 1e-6)


def test_torch_with_bfloat16_scores_none_of_which_is_positive():
    tensors = make_tensors()
    tensors.b_enc.fill_(-1e3)
    step = TorchStep(make_settings(precision="bfloat16"), tensors)
    step.step(make_batches(1, 12)[0], rates(0))
    assert step.not_finite() is None and step.figures().n_active == 0


def test_rounding_of_moments_repeats_and_follows_the_seed():
    first, second, other = (
        moments_of(make_settings(moments="bfloat16", seed=seed), n_steps=1)[0].moments["W_dec"][1] for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    torch.testing.assert_close(first, other, rtol=2**-6, atol=0)


def test_the_list_of_the_dead_is_as_long_as_it_must_be():
    settings = make_settings(dead_tokens=1000)
    tensors = make_tensors(F=600, device=DEVICE)
    step = TritonStep(settings, tensors)
    # 64 steps of 12 tokens: whoever has 232 by now may die before the next look
    for at_risk, length in ((0, 0), (1, 256), (256, 256), (257, 512), (513, 600)):
        tensors.tokens_since_fired.fill_(231)
        tensors.tokens_since_fired[:at_risk] = 232
        step._plan(0)
        assert (0 if step._dead is None else len(step._dead.decoder)) == length
    assert places(34_406) == 36_864
    assert all(n <= places(n) <= max(n * 9 / 8, n + 256) for n in range(0, 120_000, 77))
