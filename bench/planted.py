"""Are planted differences found? Ground-truth activations, no language model; prints a table over seeds.

    python -P bench/planted.py --seeds 5

Recall counts planted exclusive directions that a flagged latent stands for (cosine > 0.8 in its own model),
precision counts flagged latents that stand for one. `class` goes by decoder norms, `specific` by latent scaling.
"""

import argparse
import csv
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fastdiff.analysis.analyze import analyze
from fastdiff.config import AnalyzeConfig, TrainConfig
from fastdiff.crosscoder.saved import load_crosscoder
from fastdiff.crosscoder.train import train
from fastdiff.demo.planted import planted_activations, recovered
from fastdiff.store.writer import StoreWriter

COMMON, RARE = 0.01, 0.002


def measure(seed: int, init: str, folder: Path) -> dict[str, dict[str, dict[float, float]]]:
    """Recall and precision of one seed, by column and side."""
    planted = planted_activations(seed, n_tokens=120_000, d_model=48, shared=80, exclusive={COMMON: 20, RARE: 20})
    n, M, d_model = planted.activations.shape
    row = np.arange(n)
    meta = {"models": [{"name": "base"}, {"name": "tuned"}]}
    with StoreWriter(
        folder / "acts", n_rows=n, n_models=M, d_model=d_model, dtype="float32", shard_rows=n, meta=meta
    ) as writer:
        writer.append(
            planted.activations,
            token_ids=row * 0,
            sequence_ids=row // 20,
            positions=row % 20,
            roles=row * 0,
            sources=row * 0,
        )
    config = TrainConfig(
        dict_size=256, k=4, steps=4500, batch_size=1024, lr=4e-3, decay_steps=1500, dead_tokens=200_000, seed=seed,
        init=init, threads=1,
    )  # fmt: skip
    directory = train(folder / "acts", folder / "run", config)
    analyze(folder / "run", AnalyzeConfig(train_seed=seed, examples=0))
    crosscoder, _ = load_crosscoder(directory)
    with (folder / "run" / "analysis" / "latents.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    found = {}
    for column, name in (("class", "{}_only"), ("specific", "{}")):
        flagged = {side: torch.tensor([r[column] == name.format(side) for r in rows]) for side in ("base", "tuned")}
        found[column] = recovered(planted, crosscoder.W_dec.detach(), flagged)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--init", choices=["independent", "shared"], default="independent")
    arguments = parser.parse_args()
    print(f"init {arguments.init}; 20 planted directions per side and frequency")
    print("seed  column    side   recall at 1%  recall at 0.2%  precision  seconds")
    missed = []
    for seed in range(arguments.seeds):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = measure(seed, arguments.init, Path(folder))
        for column, sides in found.items():
            for side, r in sides.items():
                figures = f"{r[COMMON]:12.2f}  {r[RARE]:14.2f}  {r[0.0]:9.2f}  {time.monotonic() - started:7.0f}"
                print(f"{seed:4}  {column:8}  {side:5}  {figures}", flush=True)
                recall = r[COMMON] >= 0.9 if column == "class" else r[RARE] >= 0.7
                if not recall or r[0.0] < 0.8:
                    missed.append(f"seed {seed}, {column}, {side}")
    if missed:
        raise SystemExit(f"below target (class: 0.9 at 1%; specific: 0.7 at 0.2%; precision 0.8): {missed}")


if __name__ == "__main__":
    main()
