"""Does the dense trainer that fastdiff is compared with compute what the published trainer computes?

    git clone https://github.com/science-of-finetuning/crosscoder_learning
    pip install datasets einops zstandard
    python -P bench/published.py crosscoder_learning

Both start from the same weights and take the same batches of planted activations (bench/quality.py), without warm-up
or decay, whose schedules differ in a step, and with a dead window so short that AuxK acts. What is left out of theirs:
its first guess of b_dec, and its threshold before step 1000, which is not set.

The exit code is 1 if a loss is off by more than 1e-5 or a weight by more than 1e-4 (relative norm) at the end.
"""

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import quality

from fastdiff.benchmark.dense import DenseTrainer
from fastdiff.config import TrainConfig
from fastdiff.crosscoder.model import Crosscoder

LARGEST_LOSS, LARGEST_WEIGHT = 1e-5, 1e-4


def trainer_module(checkout: Path) -> Any:
    """Their trainers/crosscoder.py, without the package's own start, which loads nnsight."""
    for name, folder in (("dictionary_learning", ""), ("dictionary_learning.trainers", "trainers")):
        package = ModuleType(name)
        package.__path__ = [str(checkout / "dictionary_learning" / folder)]
        sys.modules[name] = package
    return importlib.import_module("dictionary_learning.trainers.crosscoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    options = quality.BASE | {"steps": arguments.steps, "decay_steps": 0, "warmup_steps": 0}
    config = TrainConfig(**options | {"dead_tokens": 2 * quality.BATCH, "init": "shared"})
    rows = quality.planted(0, quality.MIXED).activations[: quality.TOKENS]
    batches = quality.shuffled(rows, config.batch_size, 0)
    crosscoder = Crosscoder(quality.F, 2, quality.D, activation="batchtopk", k=config.k)
    quality.start(crosscoder, config, rows, next(quality.shuffled(rows, config.batch_size, 0)))
    ours = DenseTrainer(crosscoder, config)

    theirs = trainer_module(arguments.checkout)
    model = theirs.BatchTopKCrossCoder(quality.D, quality.F, 2, k=config.k)
    weights = {
        "W_enc": model.encoder.weight,
        "b_enc": model.encoder.bias,
        "W_dec": model.decoder.weight,
        "b_dec": model.decoder.bias,
    }
    for name, parameter in weights.items():
        # the dense trainer has their layout
        parameter.data.copy_(getattr(ours, name).detach())
    trainer = theirs.BatchTopKCrossCoderTrainer(
        steps=config.steps, activation_dim=quality.D, dict_size=quality.F, k=config.k, layer=0, lm_name="planted",
        lr=config.lr, auxk_alpha=config.auxk_coef, warmup_steps=0, device="cpu", pretrained_ae=model,
    )  # fmt: skip
    trainer.dead_feature_threshold = config.dead_tokens

    losses, with_auxk = [], 0
    for step in range(config.steps):
        batch = next(batches)
        mine = ours.step(batch)
        # from step 1 on: at step 0 it sets b_dec
        loss = trainer.update(step + 1, crosscoder.normalize(batch).clone())
        assert mine is not None
        losses.append(abs(mine - loss) / loss)
        with_auxk += trainer.running_deads > 0
    with torch.no_grad():
        gaps = {n: float((getattr(ours, n) - w).norm() / w.norm()) for n, w in weights.items()}
    print(f"{config.steps} steps, AuxK in {with_auxk}; largest relative difference of a loss {max(losses):.1e}")
    print("of weights at the end: " + ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items()))
    # all, so that a NaN does not pass
    same = all(gap <= LARGEST_LOSS for gap in losses) and all(gap <= LARGEST_WEIGHT for gap in gaps.values())
    if not same or not with_auxk:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
