"""How far a result can be trusted: seven checks, in the same words at every stage, in JSON and in the report.

Each is *fine*, *poor*, or *not checked* with the command that would check it. What is not checked is never fine.

    reconstruction   how much of the activations' variance the crosscoders explain, and how many latents never fire
    sinks            whether rows with outlying norms were left out of use
    seeds            whether the result was made with three crosscoders or more, and comes back in them
    splice           what the reconstructions are worth to the models themselves
    attribution      whether the models were run again, and the parts add up to the whole
    null             whether τ was held against a pair whose models differ by nothing that counts
    power            whether every category has enough documents to be told
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from fastdiff.results.analysis import SUMMARY, read_analysis_summary
from fastdiff.results.attribution import DIRECTORY, GAP_MOST, read_summary
from fastdiff.results.verdict import Comparison, VerdictFile
from fastdiff.rundir import DONE, MANIFEST, read_json, read_manifest

Name = Literal["reconstruction", "sinks", "seeds", "splice", "attribution", "null", "power"]
State = Literal["fine", "poor", "not checked"]

# what is known once a stage has ended
TRAINED: tuple[Name, ...] = ("reconstruction", "sinks", "seeds")
ATTRIBUTED: tuple[Name, ...] = ("attribution",)
ANALYZED: tuple[Name, ...] = ("reconstruction", "sinks", "seeds", "splice")
COMPARED: tuple[Name, ...] = ("reconstruction", "sinks", "seeds", "splice", "attribution")

FVE_LEAST = 0.8
NEVER_FIRED_MOST = 0.3
SEEDS_LEAST = 3
RECOVERED_LEAST = 0.9
# nats that zeros in place of the activations must cost a model; of less, no share says what a reconstruction keeps
ZEROS_LEAST = 0.1
# the default of --tau, in nats: an A/A run that shows more has taken the place of it
TAU = 0.05


class Check(BaseModel):
    """One of the seven.

    Attributes:
        name: Which.
        state: fine, poor, or not checked.
        says: What was found, or what is missing, as a sentence.
        remedy: What checks it or makes it better; None where there is nothing to do.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    state: State
    says: str
    remedy: str | None = None

    def line(self) -> str:
        """All of it in one line."""
        return f"{self.name}: {self.state}; {self.says}" + (f" To do: {self.remedy}." if self.remedy else "")


class Trusted(BaseModel):
    """The checks of a run, or of a comparison between two."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    of: str
    checks: list[Check]

    @property
    def state(self) -> State:
        """Fine only if all are; poor if one is."""
        states = {check.state for check in self.checks}
        return "poor" if "poor" in states else "not checked" if "not checked" in states else "fine"

    def sentence(self) -> str:
        """How many are what."""
        n_poor, n_open = (sum(c.state == state for c in self.checks) for state in ("poor", "not checked"))
        named = [f"{n_poor} {'is' if n_poor == 1 else 'are'} poor"] * bool(n_poor)
        named += [f"{n_open} {'was' if n_open == 1 else 'were'} not checked"] * bool(n_open)
        if not named:
            return f"All {len(self.checks)} checks are fine."
        return f"Of {len(self.checks)} checks, {' and '.join(named)}: read the result with care."


def run_checks(run: Path, names: Sequence[Name], called: str | None = None) -> list[Check]:
    """Those checks of a run that its own files tell.

    Args:
        run: The run directory.
        names: Which checks.
        called: What commands call the run, and then nothing says where its store is; its path unless given.

    Raises:
        InputError: A file is damaged.
    """
    # what is called by a name may lie anywhere, and so may its store
    store = "STORE" if called else _store(run)
    crosscoders, analysis, called = _crosscoders(run), None, called or shlex.quote(str(run))
    if (run / "analysis" / DONE).exists():
        analysis = read_analysis_summary(run)
    found = {
        "reconstruction": lambda: _reconstruction(called, crosscoders, analysis),
        "sinks": lambda: _sinks(called, store, crosscoders, analysis),
        "seeds": lambda: _seeds(called, store, crosscoders, analysis),
        "splice": lambda: _splice(called, analysis),
        "attribution": lambda: _attribution(run, called),
    }
    return [found[name]() for name in names]


def compared(runs: Mapping[str, Path], verdict: VerdictFile, *, by_name: bool = False) -> list[Trusted]:
    """All checks of every run of a comparison, and of the comparison between two.

    Args:
        runs: Run directories by the names that the comparison gives them.
        verdict: What it found.
        by_name: Whether commands call the runs by these names instead of their paths, for what must not depend on
            where a run lies.

    Raises:
        InputError: A file is damaged.
    """
    found = []
    for comparison in verdict.comparisons:
        called = [shlex.quote(name if by_name else str(runs[name])) for name in comparison.runs]
        lost = [name for run in comparison.runs for name in _none_long_enough(runs[run])]
        own = [_null(called, comparison, verdict), _power(called, comparison, list(dict.fromkeys(lost)))]
        if comparison.kind == "pair":
            own = [*run_checks(runs[comparison.runs[0]], COMPARED, called[0] if by_name else None), *own]
        found.append(Trusted(of=comparison.name, checks=own))
    return found


def _store(run: Path) -> str:
    """The store that the run was trained on, as a command names it."""
    if not (run / MANIFEST).exists():
        return "STORE"
    return shlex.quote(str(read_manifest(run)["stages"].get("train", {}).get("store", "STORE")))


def _again(command: str, run: str) -> str:
    """A command on a run, and what has to follow before the report knows of it; each keeps its options of last time."""
    later = ["train", "attribute", "analyze", "annotate"]
    steps = [f"fastdiff {name} {run}" for name in later[later.index(command.split()[1]) + 1 :]]
    return f"{', then '.join([command, *steps])}, and compare and report again"


def _crosscoders(run: Path) -> dict[int, dict[str, Any]]:
    """config.json of the finished crosscoders by seed."""
    found = {}
    for mark in run.glob(f"crosscoder/seed-*/{DONE}"):
        seed = mark.parent.name.removeprefix("seed-")
        if seed.isdecimal() and (mark.parent / "config.json").exists():
            found[int(seed)] = read_json(mark.parent / "config.json", 1)
    return dict(sorted(found.items()))


def _reconstruction(run: str, crosscoders: dict[int, dict[str, Any]], analysis: dict[str, Any] | None) -> Check:
    qualities = [one["quality"] for one in crosscoders.values() if "quality" in one]
    if not qualities and analysis is not None:
        qualities = [analysis["quality"]]
    if not qualities:
        says = "The crosscoder was not measured."
        return Check(
            name="reconstruction", state="not checked", says=says, remedy=_again(f"fastdiff analyze {run}", run)
        )
    by_model = zip(*(quality["fve"] for quality in qualities), strict=True)
    fve = [min(_known(value) for value in values) for values in by_model]
    worst = " and ".join("nothing" if value == -math.inf else f"{value:.2f}" for value in fve) or "nothing"
    seeds = f" (the least of {len(qualities)} seeds)" if len(qualities) > 1 else ""
    says = f"The crosscoder explains {worst} of the models' variance{seeds}."
    remedy = None
    if min(fve, default=-math.inf) < FVE_LEAST:
        remedy = "train for more steps, with a larger k, more latents or a higher learning rate"
    # on few held-out rows many latents are silent that do fire, so this takes the whole text of the analysis
    if analysis is not None:
        silent = analysis["never_fired"] / analysis["dict_size"]
        says += f" {silent:.0%} of the latents fired nowhere in the text that was analyzed."
        if silent > NEVER_FIRED_MOST:
            # more latents would only be more silent ones
            remedy = "train on more text, for more steps, or with fewer latents"
    return Check(name="reconstruction", state="poor" if remedy else "fine", says=says, remedy=remedy)


def _sinks(run: str, store: str, crosscoders: dict[int, dict[str, Any]], analysis: dict[str, Any] | None) -> Check:
    made = [one for one in (*crosscoders.values(), analysis or {}) if one.get("left_out")]
    if not made:
        says = "It is not known whether rows with outlying norms were left out of use."
        return Check(
            name="sinks",
            state="not checked",
            says=says,
            remedy=f"train again with this version: fastdiff train {store} -o NEW_RUN -c {run}/fastdiff.yaml",
        )
    facts = made[0]["left_out"]
    if not facts["max_norm"]:
        says = "Rows with outlying norms were kept in use (--max-norm 0)."
        return Check(name="sinks", state="not checked", says=says, remedy="extract without --max-norm 0")
    if not facts["rows"]:
        says = f"No row has a norm over {facts['max_norm']:g} times the median."
        return Check(name="sinks", state="fine", says=says)
    variance = " and ".join(f"{share:.0%}" for share in facts["variance_share"])
    says = (
        f"{facts['rows']:,} rows ({facts['share']:.1%}) with {variance} of the variance were left out of use: their "
        f"norm is over {facts['max_norm']:g} times the median. Such rows, mostly attention sinks, are alike in every "
        "text. What is said of the crosscoder is said of the other rows."
    )
    return Check(name="sinks", state="fine", says=says)


def _seeds(run: str, store: str, crosscoders: dict[int, dict[str, Any]], analysis: dict[str, Any] | None) -> Check:
    n = len(crosscoders)
    more = _again(f"fastdiff train {store} -o {run} --seeds 0,1,2", run)
    if n < 2:
        says = "One crosscoder was trained, so chance in training was not seen."
        return Check(name="seeds", state="not checked", says=says, remedy=more)
    if n < SEEDS_LEAST:
        says = f"Only {n} crosscoders were trained."
        return Check(name="seeds", state="poor", says=says, remedy=more)
    says = f"{n} crosscoders were trained, and a change is confirmed only where the latents of each have its sign."
    if analysis is not None and (of := analysis.get("stability")) is not None and of["exclusive"]:
        n = of["exclusive_stable"]
        again = "none comes" if not n else "one comes" if n == 1 else f"{n:,} come"
        says += (
            f" Of the {of['exclusive']:,} latents that only one of the models has, {again} back in the others: "
            "a single latent is what one crosscoder made of the text."
        )
    return Check(name="seeds", state="fine", says=says)


def _splice(run: str, analysis: dict[str, Any] | None) -> Check:
    facts = None if analysis is None else analysis.get("splice")
    if facts is None:
        says = "The reconstructions were not put back into the models."
        return Check(
            name="splice", state="not checked", says=says, remedy=_again(f"fastdiff analyze {run} --splice", run)
        )
    needed = ("ce", "ce_spliced", "ce_zero")
    if broken := [model["name"] for model in facts["models"] if any(model[name] is None for name in needed)]:
        says = f"{' and '.join(broken)} gave NaN or infinity, so nothing is known of the reconstructions."
        return Check(name="splice", state="not checked", says=says, remedy="see whether the weights are whole")
    told = [model for model in facts["models"] if model["ce_zero"] - model["ce"] >= ZEROS_LEAST]
    says = ""
    if told:
        shown = " and ".join(f"{model['loss_recovered']:.0%} for {model['name']}" for model in told)
        says = f"Reconstructions in place of the activations keep {shown} of what zeros there cost the model. "
    if any(model["loss_recovered"] < RECOVERED_LEAST for model in told):
        remedy = "train for more steps, with a larger k or more latents"
        return Check(name="splice", state="poor", says=says.strip(), remedy=remedy)
    if cheap := [model["name"] for model in facts["models"] if model not in told]:
        says += f"Zeros in place of the activations cost {' and '.join(cheap)} less than {ZEROS_LEAST:g} nats a token, "
        says += "so nothing can be said of what a reconstruction keeps."
        return Check(name="splice", state="not checked", says=says, remedy="extract another layer or hook")
    return Check(name="splice", state="fine", says=says.strip())


def _attribution(run: Path, called: str) -> Check:
    if not (run / DIRECTORY / SUMMARY).exists() or not (run / DIRECTORY / DONE).exists():
        says = "The models were not run again, so nothing is known of their behaviour."
        return Check(
            name="attribution", state="not checked", says=says, remedy=_again(f"fastdiff attribute {called}", called)
        )
    found = read_summary(run / DIRECTORY)
    if found.state == "not checked":
        return Check(name="attribution", state="not checked", says=f"{found.reason}.", remedy=found.remedy)
    gap = found.largest_gap
    says = f"The parts add up to the whole within {'an unknown share' if gap is None else f'{gap:.1%}'}."
    poor = gap is None or gap > GAP_MOST
    remedy = (
        "read V of the category with the largest gap as rough; its documents took as many midpoints as they may"
        if poor
        else None
    )
    return Check(name="attribution", state="poor" if poor else "fine", says=says, remedy=remedy)


def _null(called: Sequence[str], comparison: Comparison, verdict: VerdictFile) -> Check:
    if comparison.state == "not checked":
        return Check(name="null", state="not checked", says="Nothing was decided that a null could be held against.")
    if verdict.tau_from is None:
        again = " ".join(["fastdiff compare", *called, *(["-o OUT"] if len(called) > 1 else [])])
        says = (
            "How much a pair of models without a change would show was not measured, so the threshold of "
            f"{verdict.tau:g} nats is an agreement."
        )
        remedy = "make a run of such a pair on the same text (base, and base trained further on its own data), then "
        return Check(name="null", state="not checked", says=says, remedy=f"{remedy}{again} --null THAT_RUN")
    largest = verdict.tau_from.largest
    says = f"{verdict.tau_from.run}, a pair of models without a change that counts, shows {largest:.3f} nats at most."
    # τ is the larger of --tau and what the null shows
    if largest < verdict.tau or largest <= TAU:
        return Check(name="null", state="fine", says=says)
    return Check(name="null", state="poor", says=f"{says} Smaller changes cannot be distinguished from that pair's.")


def _none_long_enough(run: Path) -> list[str]:
    directory = run / DIRECTORY
    return read_summary(directory).none_long_enough if (directory / DONE).exists() else []


def _power(called: Sequence[str], comparison: Comparison, lost: Sequence[str]) -> Check:
    if comparison.state == "not checked":
        return Check(name="power", state="not checked", says="No category was decided.", remedy=comparison.remedy)
    rows = [row for row in comparison.rows if row.verdict == "cannot tell"]
    if lost:
        says = f"There is no row of {', '.join(lost)}: none of the documents has two scored tokens."
        if rows:
            says += f" Besides, {', '.join(row.category for row in rows)} could not be decided."
        return Check(name="power", state="poor", says=says, remedy="extract longer documents, or more of each category")
    if not rows:
        n = min((row.documents_nats for row in comparison.rows), default=0)
        nobodys = [row.category for row in comparison.rows if row.verdict == "neither has it"]
        if comparison.rows and len(nobodys) == len(comparison.rows):
            says = "Neither model predicts any category better than the frequencies of single tokens do."
            remedy = "extract text that at least one of the models was made for, in its chat template if it has one"
            return Check(name="power", state="poor", says=says, remedy=remedy)
        says = f"Every category was decided, on {n} traced documents or more."
        if nobodys:
            says += f" Of {', '.join(nobodys)} nothing can be said: neither model has it."
        return Check(name="power", state="fine", says=says)
    names = ", ".join(row.category for row in rows)
    says = f"{len(rows)} of {len(comparison.rows)} categories could not be decided: {names}."
    needed = max((row.documents_needed or 0 for row in rows), default=0)
    remedy = f"extract about {needed} documents of each" if needed else "extract more documents of each"
    if all(row.reason == "too few traced documents" for row in rows):
        remedy = f"fastdiff attribute {called[0]} with more --documents"
        if len(called) > 1:
            remedy = "extract both runs from the same text, so that the same documents are traced in both"
    return Check(name="power", state="poor", says=says, remedy=remedy)


def _known(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value
