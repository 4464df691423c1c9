"""How good are crosscoders of each objective, beside the published trainer?

    fastdiff demo -o fastdiff-demo
    python -P bench/quality.py --demo fastdiff-demo --out bench/results/quality.md

Planted activations, so the truth is known: 400 shared directions, each turned a little in the tuned model, and
exclusive ones, by default 16 per side at each of 0.2, 0.1 and 0.03 % of the tokens; 3.5 fire on a token. D 64, F 1024,
k 12, 300,000 tokens, 3000 steps of 2048. All rows of a table see the same tokens in the same order. Recall is the share
of the exclusive directions that a flagged latent stands for (cosine > 0.8 in its own model), by decoder norms (Δ) or by
latent scaling (ν); precision the share of flagged latents that stand for one. fve is of 20,000 held-out tokens at the
threshold that lets k latents fire; dead of all training tokens. Then directions of one frequency only, and none at all:
whatever is flagged there is wrong. Last, with --demo, activations of the demo's first pair and its training options.

`published` is the dense trainer of fastdiff.benchmark.dense, the mathematics of dictionary_learning's crosscoder
trainer (`bench/published.py` compares); `published recipe` adds its shared initialisation.

Every run is a line of the .jsonl beside --out; what is there with the same options is not run again, so the tables can
be made in parts. After a change of fastdiff itself, begin without that file.

Fails where fastdiff is worse than the published trainer by more than 0.002 fve, 1 point of dead latents or 0.02 recall,
means over seeds, and where the recipe for rare differences, jumprelu's L0 or the null miss their aim.
"""

import argparse
import json
import multiprocessing
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from fastdiff.analysis.classes import delta_norm, specific
from fastdiff.analysis.scaling import ScalingSums, nu
from fastdiff.benchmark.dense import DenseTrainer
from fastdiff.config import TrainConfig
from fastdiff.crosscoder.fused_trainer import make_trainer
from fastdiff.crosscoder.metrics import evaluate
from fastdiff.crosscoder.model import Crosscoder
from fastdiff.crosscoder.structure import structure_of
from fastdiff.crosscoder.threshold import calibrated_threshold
from fastdiff.demo.planted import Planted, planted_activations, recovered
from fastdiff.store.reader import ActivationStore

D, F, K, STEPS, BATCH, TOKENS, HELD_OUT = 64, 1024, 12, 3000, 2048, 300_000, 20_000
RATES = (0.002, 0.001, 0.0003)
BASE = {"dict_size": F, "k": K, "steps": STEPS, "batch_size": BATCH, "lr": 8e-3, "decay_steps": STEPS // 2}
PUBLISHED = "published recipe"
# what differs from BASE; rows whose name begins with "published" train densely
ROWS: dict[str, dict[str, Any]] = {
    PUBLISHED: {"init": "shared"},
    "published, independent": {},
    "batchtopk, shared init": {"init": "shared"},
    "batchtopk": {},
    "topk": {"activation": "topk"},
    "topk, multi-topk 1/8": {"activation": "topk", "multi_topk_coef": 0.125},
    "batchtopk, delta 1": {"delta_coef": 1.0},
    "batchtopk, exclusive 5 %": {"exclusive": 0.05},
    "batchtopk, 512 shared": {"shared_latents": 512},
    "batchtopk, matryoshka": {"matryoshka": (0.25, 0.5)},
    "batchtopk, code norm sae": {"code_norm": "sae"},
    "batchtopk, code norm none": {"code_norm": "none"},
    "jumprelu, L0 target": {"activation": "jumprelu"},
    "jumprelu, tanh": {"activation": "jumprelu", "sparsity": "tanh", "l0_coef": 0.03, "preact_coef": 3e-6},
    "relu, L1": {"activation": "relu", "l1_coef": 0.2},
    "sae of tuned": {"inputs": "1"},
    "difference-sae": {"inputs": "difference"},
}
COMPARED = (("batchtopk, shared init", PUBLISHED), ("batchtopk", "published, independent"))
# exclusive directions per side, by frequency
MIXED, NONE = "mixed", "none"
DATA: dict[str, dict[float, int]] = {
    MIXED: dict.fromkeys(RATES, 16),
    **{f"{rate:.2%}": {rate: 32} for rate in RATES},
    NONE: {},
}
DEMO = "demo"


@dataclass(frozen=True)
class Case:
    """One run."""

    data: str  # of DATA, or DEMO
    row: str
    seed: int
    steps: int


@dataclass(frozen=True)
class Result:
    """Figures of one run; recall by verdict and frequency in percent, mean of both sides."""

    fve: float
    l0: float
    dead: float
    recall: dict[str, dict[str, float]]
    precision: dict[str, float]
    flagged: dict[str, int]


def planted(seed: int, data: str) -> Planted:
    """The activations of a seed."""
    return planted_activations(
        seed,
        n_tokens=TOKENS + HELD_OUT,
        d_model=D,
        shared=400,
        exclusive=DATA[data],
        shared_frequency=(0.002, 0.02),
        noise=0.1,
    )


def demo_rows(demo: Path) -> tuple[Tensor, Tensor]:
    """Training and held-out activations of the demo's first pair."""
    with ActivationStore(demo / "acts-instruct") as store:
        n = store.n_train(TrainConfig().holdout)
        return store.rows(np.arange(n)), store.rows(np.arange(n, store.n_rows))


def fit(case: Case, demo: Path | None) -> Result:
    """Train and measure."""
    torch.set_num_threads(1)
    truth = None
    if case.data == DEMO:
        assert demo is not None
        recorded = yaml.safe_load((demo / "instruct" / "fastdiff.yaml").read_text(encoding="utf-8"))
        config = TrainConfig(**recorded["train"])
        rows, held_out = demo_rows(demo)
    else:
        config = TrainConfig(**BASE | {"steps": case.steps, "decay_steps": case.steps // 2})
        truth = planted(case.seed, case.data)
        rows, held_out = truth.activations[:TOKENS], truth.activations[TOKENS:]
    config = TrainConfig(**config.model_dump() | ROWS[case.row] | {"seed": case.seed})
    M = 2 if config.inputs == "all" else 1
    crosscoder = Crosscoder(
        config.dict_size,
        M,
        rows.shape[2],
        activation=config.activation,
        k=config.k,
        code_norm=config.code_norm,
        inputs=config.inputs,
    )
    batches = shuffled(rows, config.batch_size, case.seed)
    start(crosscoder, config, rows, next(shuffled(rows, config.batch_size, case.seed)))
    dense = case.row.startswith("published")
    trainer = DenseTrainer(crosscoder, config, published=False) if dense else make_trainer(crosscoder, config)
    for _ in range(config.steps):
        trainer.step(next(batches))
    if isinstance(trainer, DenseTrainer):
        for key, value in trainer.weights().items():
            getattr(crosscoder, key).data.copy_(value)
    if config.activation == "batchtopk":
        crosscoder.threshold.fill_(calibrated_threshold(crosscoder, lambda: rows[:100_000].split(4096)))
    quality = evaluate(crosscoder, held_out.split(4096))
    dead = evaluate(crosscoder, rows.split(4096)).silent_fraction
    recall, precision, flagged = verdicts(crosscoder, truth, rows) if truth and M == 2 else ({}, {}, {})
    return Result(quality.fve_pooled, quality.l0_mean, dead, recall, precision, flagged)


def shuffled(rows: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches without end, every row once per pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for numbers in torch.randperm(len(rows), generator=generator).split(batch_size):
            if len(numbers) == batch_size:
                yield rows[numbers]


def start(crosscoder: Crosscoder, config: TrainConfig, rows: Tensor, first: Tensor) -> None:
    """Scaling and weights as `fastdiff train` starts with."""
    taken = crosscoder.take(rows).double()
    width = taken.shape[2]
    crosscoder.input_mean.copy_(taken.mean(dim=0))
    crosscoder.input_scale.copy_((width / taken.var(dim=0, correction=0).sum(dim=-1)).sqrt())
    structure = structure_of(config, taken.shape[1])
    crosscoder.initialize(crosscoder.normalize(first), init=config.init, seed=config.seed, structure=structure)


def verdicts(
    crosscoder: Crosscoder, truth: Planted, rows: Tensor
) -> tuple[dict[str, dict[str, float]], dict[str, float], dict[str, int]]:
    """Recall by frequency, precision and how many latents are flagged, by verdict."""
    F, M, _ = crosscoder.W_dec.shape
    sums = ScalingSums.zeros(F, M)
    W_dec, b_dec = crosscoder.W_dec.detach().double(), crosscoder.b_dec.detach().double()
    for batch in rows.split(4096):
        x = crosscoder.normalize(batch)
        sums.add(W_dec, b_dec, x, *crosscoder.encode(x))
    delta, betas = delta_norm(W_dec), sums.betas(W_dec)
    ratios = [nu(betas[target], delta).numpy() for target in ("error", "reconstruction")]
    by_nu = specific(delta.numpy(), *ratios)
    recall, precision, number = {}, {}, {}
    for verdict, flagged in {
        "Δ": {"base": delta < 0.1, "tuned": delta > 0.9},
        "ν": {side: torch.from_numpy(by_nu == side) for side in ("base", "tuned")},
    }.items():
        found = recovered(truth, crosscoder.W_dec.detach(), flagged)
        rates = sorted(set(found["base"]) - {0.0}, reverse=True)
        recall[verdict] = {f"{rate:.2%}": (found["base"][rate] + found["tuned"][rate]) / 2 for rate in rates}
        precision[verdict] = min(found[side][0.0] for side in ("base", "tuned"))
        number[verdict] = int(sum(int(one.sum()) for one in flagged.values()))
    return recall, precision, number


def options_of(case: Case) -> dict[str, Any]:
    """What a run is trained with, as JSON has it; for the demo what differs from its own."""
    options: dict[str, Any] = ROWS[case.row] if case.data == DEMO else BASE | ROWS[case.row]
    return dict(json.loads(json.dumps(options)))


class Table:
    """Results by data, row and seed, kept in a file."""

    def __init__(self, path: Path | None):
        self.path = path
        self.found: dict[Case, Result] = {}
        if path is not None and path.exists():
            for text in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(text)
                case = Case(**record["case"])
                if record["options"] == options_of(case):
                    self.found[case] = Result(**record["result"])

    def add(self, case: Case, result: Result) -> None:
        """Keep a result."""
        self.found[case] = result
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                record = {"case": vars(case), "options": options_of(case), "result": vars(result)}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def of(self, data: str, row: str, steps: int) -> list[Result]:
        """The results of a row, by seed."""
        return list(self.by_seed(data, row, steps).values())

    def by_seed(self, data: str, row: str, steps: int) -> dict[int, Result]:
        """The same with the seeds."""
        cases = [c for c in self.found if (c.data, c.row, c.steps) == (data, row, steps)]
        return {case.seed: self.found[case] for case in sorted(cases, key=lambda c: c.seed)}

    def pairs(self, data: str, ours: str, theirs: str, steps: int) -> list[tuple[Result, Result]]:
        """The results of two rows on the seeds that both have."""
        a, b = self.by_seed(data, ours, steps), self.by_seed(data, theirs, steps)
        return [(a[seed], b[seed]) for seed in a if seed in b]


def mean(values: list[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def mean_recall(results: list[Result], verdict: str, rate: str) -> float:
    """Over seeds."""
    return mean([r.recall[verdict][rate] for r in results])


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def figures(results: list[Result]) -> list[str]:
    """The cells that every table has; means over seeds."""
    return [
        str(len(results)),
        f"{mean([r.fve for r in results]):.4f}",
        f"{mean([r.l0 for r in results]):.2f}",
        f"{mean([r.dead for r in results]):.1%}",
    ]


def by_objective(found: Table, steps: int) -> str:
    """The first table."""
    rates = [f"{rate:.2%}" for rate in RATES]
    lines = []
    for row in ROWS:
        results = found.of(MIXED, row, steps)
        if not results:
            continue
        cells = [row, *figures(results)]
        for verdict in ("Δ", "ν"):
            known = bool(results[0].recall)
            cells += [f"{mean_recall(results, verdict, rate):.2f}" if known else "" for rate in rates]
            cells.append(f"{min(r.precision[verdict] for r in results):.2f}" if known else "")
        lines.append(cells)
    head = ["objective", "seeds", "fve", "L0", "dead"]
    for verdict in ("Δ", "ν"):
        head += [*(f"{verdict} {rate}" for rate in rates), "precision"]
    return table(head, lines)


def by_frequency(found: Table, steps: int) -> str:
    """The table of one frequency at a time, and of none."""
    lines = []
    for data in DATA:
        for row in ROWS:
            results = found.of(data, row, steps)
            if data == MIXED or not results:
                continue
            cells = [data, row, *figures(results)]
            for verdict in ("Δ", "ν"):
                cells.append(f"{mean_recall(results, verdict, data):.2f}" if data != NONE else "")
                cells.append(f"{min(r.precision[verdict] for r in results):.2f}" if data != NONE else "")
                cells.append(f"{mean([r.flagged[verdict] for r in results]):.1f}")
            lines.append(cells)
    head = ["frequency", "objective", "seeds", "fve", "L0", "dead"]
    return table([*head, *(f"{v}{of}" for v in ("Δ", "ν") for of in ("", " precision", " flagged"))], lines)


def on_demo(found: Table, steps: int) -> str:
    """The table of the demo's activations."""
    results = {row: found.of(DEMO, row, steps) for row in ROWS}
    return table(
        ["objective", "seeds", "fve", "L0", "dead"], [[row, *figures(of)] for row, of in results.items() if of]
    )


def missed(found: Table, steps: int) -> list[str]:
    """Aims that were not reached, of the rows that ran."""
    problems = []
    for data in (MIXED, DEMO):
        for ours, theirs in COMPARED:
            both = found.pairs(data, ours, theirs, steps)
            if both:
                a, b = [r for r, _ in both], [r for _, r in both]
                problems += [f"{data}: {ours} {worse}" for worse in worse_than(a, b, theirs)]
    for r, p in found.pairs(MIXED, "batchtopk", PUBLISHED, steps):
        if r.recall["ν"]["0.10%"] < 0.6 or r.precision["ν"] < 0.9 or r.fve < p.fve - 0.01:
            problems.append(f"rare differences: recall {r.recall['ν']['0.10%']}, precision {r.precision['ν']}")
    for r in found.of(MIXED, "jumprelu, L0 target", steps):
        if abs(r.l0 / K - 1) > 0.05:
            problems.append(f"jumprelu: L0 {r.l0:.2f} instead of {K}")
    for row in ROWS:
        for r in found.of(NONE, row, steps):
            if max(r.flagged.values()) > F / 1000:
                problems.append(f"{row}: flags {r.flagged} of {F} latents where nothing is exclusive")
    return problems


def worse_than(ours: list[Result], theirs: list[Result], name: str) -> list[str]:
    """In which means over the same seeds the first is worse than the published trainer."""
    problems = []
    fve = mean([r.fve for r in ours]) - mean([r.fve for r in theirs])
    dead = mean([r.dead for r in ours]) - mean([r.dead for r in theirs])
    if fve < -0.002:
        problems.append(f"has fve {fve:+.4f} against {name}")
    if dead > 0.01:
        problems.append(f"has dead {dead:+.1%} against {name}")
    for verdict in ours[0].recall:
        recall = mean([mean(list(r.recall[verdict].values())) for r in ours])
        recall -= mean([mean(list(r.recall[verdict].values())) for r in theirs])
        if recall < -0.02:
            problems.append(f"has recall by {verdict} {recall:+.3f} against {name}")
    return problems


def fitted(work: tuple[Case, Path | None]) -> tuple[Case, Result]:
    """A case and its result, from another process."""
    return work[0], fit(*work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="Of the first table.")
    parser.add_argument("--demo", type=Path, help="Directory of `fastdiff demo`.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    work = [(MIXED, row) for row in arguments.rows]
    if arguments.demo:
        work += [(DEMO, row) for pair in COMPARED for row in pair if row in arguments.rows]
    work += [(data, row) for data in DATA if data != MIXED for row in (PUBLISHED, "batchtopk") if row in arguments.rows]
    found = Table(arguments.out and arguments.out.with_suffix(".jsonl"))
    cases = [Case(*one, seed, arguments.steps) for one in work for seed in range(arguments.seeds)]
    cases = [case for case in cases if case not in found.found]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for case, result in pool.imap_unordered(fitted, [(case, arguments.demo) for case in cases]):
            found.add(case, result)
    problems = missed(found, arguments.steps)
    text = "\n\n".join(
        [
            "# Quality of crosscoders by objective",
            f"`python -P bench/quality.py` (its head says what is measured): torch {torch.__version__}, "
            f"{platform.machine()}, one thread a run. Means over seeds, of precision the smallest.",
            "## Planted activations: recall by Δ_norm and by ν, by frequency of exclusive directions",
            by_objective(found, arguments.steps),
            "## 64 exclusive directions of one frequency, and none",
            by_frequency(found, arguments.steps),
            "## Activations of the demo's first pair",
            on_demo(found, arguments.steps),
            "Missed: " + ("; ".join(problems) if problems else "nothing"),
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
