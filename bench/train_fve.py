"""Does a faster step train as well? The same seed, weights and batches for each; reconstruction afterwards."""

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.benchmark.data import Synthetic
from fastdiff.benchmark.dense import DenseTrainer
from fastdiff.benchmark.machine import machine
from fastdiff.benchmark.shapes import Shape
from fastdiff.benchmark.steps import fused_steps, step_config
from fastdiff.benchmark.table import Row, format_table, write_json
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.demo.planted import planted_activations
from fastdiff.kernels import ops

LARGEST_DIFFERENCE = 0.0005
DENSE = "dense fp32"


@torch.no_grad()
def explained(crosscoder: Crosscoder, x: Tensor, k: int) -> float:
    """Fraction of the variance explained, in float64, by BatchTopK on these tokens; [B, M, D]."""
    double = copy.deepcopy(crosscoder).double()
    x = x.to(double.b_enc)
    pre = double.pre_activations(x)
    # the selection kernels take no float64
    pairs, _ = ops.batchtopk(pre.relu() * double.code_norm(), k, backend="torch")
    error = x - double.decode(pre[pairs.row, pairs.col], pairs)
    return 1 - float(error.square().sum() / (x - x.mean(dim=0)).square().sum())


def compare_training(shape: Shape, device: torch.device, steps: int, lr: float, out: Path | None) -> int:
    """Train each contestant; 1 if one of fastdiff's explains more or less than the dense float32 run by over 0.0005.

    The second dense run adds up in another order: training is chaotic, and its difference is what nothing but
    rounding makes of the same mathematics.
    """
    n_batches = min(steps, 48)
    planted = planted_activations(
        0, n_tokens=(n_batches + 2) * shape.n_tokens, d_model=shape.d_model, shared=shape.dict_size // 8,
        exclusive={0.005: shape.dict_size // 64}, shared_frequency=(0.001, 0.2), noise=0.05,
    ).activations.to(device)  # fmt: skip
    planted *= (shape.width / planted.square().sum(dim=(1, 2)).mean()).sqrt()
    batches, held_out = planted[: -2 * shape.n_tokens].split(shape.n_tokens), planted[-2 * shape.n_tokens :]
    start = Crosscoder(shape.dict_size, shape.n_models, shape.d_model, activation="batchtopk", k=shape.k).to(device)
    start.initialize(batches[0], init="independent", seed=0)
    # dead early enough that AuxK acts
    common = {"lr": lr, "steps": steps, "warmup_steps": steps // 10, "dead_tokens": 20 * shape.n_tokens}
    rows: list[Row] = []
    contestants = {
        DENSE: {"published": True},
        "dense fp32, other order of sums": {"published": False},
        "fastdiff fp32": {"precision": "float32"},
        "fastdiff bf16": {"precision": "bfloat16"},
    }
    for name, options in contestants.items():
        crosscoder = copy.deepcopy(start)
        if "published" in options:
            trainer = DenseTrainer(crosscoder, step_config(shape, **common), **options)
        else:
            nothing = torch.zeros(shape.dict_size, dtype=torch.bool, device=device)
            trainer = fused_steps(Synthetic(crosscoder, [], nothing), step_config(shape, **options, **common))
        for i in range(steps):
            trainer.step(batches[i % len(batches)])
        trainer.window()
        if isinstance(trainer, DenseTrainer):
            crosscoder.load_state_dict(crosscoder.state_dict() | trainer.weights())
        dead = int((trainer.tokens_since_fired >= common["dead_tokens"]).sum())
        rows.append({"name": name, "fve": explained(crosscoder, held_out, shape.k), "n_dead": dead})
        rows[-1]["difference"] = rows[-1]["fve"] - rows[0]["fve"]
        print(rows[-1], file=sys.stderr)
    columns = (("name", "", "{}"), ("fve", "explained", "{:.5f}"), ("difference", "difference", "{:+.5f}"),
               ("n_dead", "dead", "{}"))  # fmt: skip
    print(f"{machine(device)}\n{shape}, {steps} steps, learning rate {lr:g}, held-out tokens")
    print(format_table(rows, columns))
    ours = [row for row in rows if not row["name"].startswith(DENSE)]
    wrong = [row["name"] for row in ours if not abs(row["difference"]) <= LARGEST_DIFFERENCE]
    if out:
        write_json(out, machine=machine(device), steps=steps, lr=lr, rows=rows, missed=wrong)
    for name in wrong:
        print(f"missed: {name} differs from the dense run by more than {LARGEST_DIFFERENCE}", file=sys.stderr)
    return 1 if wrong else 0
