"""Steps are timed as they are taken, and a changed bit is seen."""

import pytest
import torch

from fastdiff.benchmark.data import synthetic
from fastdiff.benchmark.shapes import Shape
from fastdiff.benchmark.steps import fingerprint, fused_steps, measure_steps, step_config
from fastdiff.benchmark.timing import interleaved, timed
from fastdiff.errors import OptionError

SHAPE = Shape("small", 32, 2, 12, 64, 4)
CPU = torch.device("cpu")


class Counted:
    """Counts steps; the second one that is built gives other weights."""

    built = 0

    def __init__(self, data, shift):
        Counted.built += 1
        self.data, self.shift = data, shift * Counted.built
        self.steps = 0

    def step(self, batch):
        assert batch.shape == (32, 2, 12)
        self.steps += 1
        self.data.crosscoder.b_enc.data[3] += self.shift

    def window(self):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "repeats"), [(0.0, True), (1.0, False)])
def test_repeats_are_compared_bit_by_bit(shift, repeats):
    Counted.built, made = 0, []

    def make(data):
        made.append(Counted(data, shift))
        return made[-1]

    found = measure_steps(SHAPE, CPU, make, n=3, warmup=2, repeat=True)
    assert found.repeats is repeats and found.peak_bytes is None
    # two to warm up, one before the samples, three samples; only the first two again
    assert [one.steps for one in made] == [6, 2]
    assert found.timing.n == 3 and found.timing.how == "wall" and 0 < found.timing.ms <= found.timing.median_ms


def test_dead_latents_are_dead_from_the_first_step():
    data = synthetic(SHAPE, CPU, dead_share=0.25, dtype=torch.float32)
    config = step_config(SHAPE)
    trainer = fused_steps(data, config)
    assert torch.equal(trainer.tokens_since_fired >= config.dead_tokens, data.dead)
    trainer.step(data.batches[0])
    assert trainer.window().n_dead == 16


def test_the_configuration_says_what_it_was_given():
    config = step_config(SHAPE, clip_mode="previous", moments="bfloat16")
    assert (config.batch_size, config.dict_size, config.k) == (32, 64, 4)
    assert (config.activation, config.loss, config.clip, config.clip_mode) == ("batchtopk", "l2norm", 1.0, "previous")
    with pytest.raises(OptionError, match="k must lie in"):
        step_config(SHAPE, k=65)


def test_fingerprint_sees_a_bit_and_an_exchange():
    tensor = torch.randn(100, 3)
    before = fingerprint([tensor])
    assert fingerprint([tensor.clone()]) == before
    flipped = tensor.clone()
    flipped.view(torch.int32)[7, 1] ^= 1
    swapped = tensor[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    assert len({before, fingerprint([flipped]), fingerprint([swapped]), fingerprint([tensor[:50], tensor[50:]])}) == 4


def test_interleaved_calls_take_turns():
    order = []
    found = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3, warmup=1)
    assert order == list("abababab")
    assert {t.n for t in found.values()} == {3} and all(t.ms <= t.median_ms and t.cpu_ms >= 0 for t in found.values())


def test_a_longer_call_takes_longer():
    # processor time, so that a busy machine does not matter
    small, large = torch.randn(32, 32), torch.randn(512, 512)
    found = interleaved({"small": lambda: small @ small, "large": lambda: large @ large}, rounds=5)
    assert found["large"].cpu_ms > found["small"].cpu_ms
    assert timed(lambda: large @ large, CPU, n=3).ms > 0
