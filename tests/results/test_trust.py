"""Every state of every check, from files as the stages write them."""

from pathlib import Path
from typing import Any

import pytest

from fastdiff import rundir
from fastdiff.results import trust
from fastdiff.results.trust import COMPARED, Check, Trusted, compared, run_checks
from fastdiff.results.verdict import Comparison, Estimate, Tested, Verdict, VerdictFile

LEFT_OUT = {"max_norm": 3.0, "rows": 28, "share": 0.028, "variance_share": [0.5, 0.48]}
FINE = {"rows": "held-out", "n_rows": 100, "fve": [0.9, 0.85], "fve_all": [0.9, 0.85], "never_fired": 1}
WHOLE = {"name": "m", "ce": 2.0, "ce_spliced": 2.1, "ce_zero": 9.0}
SPLICE = {"models": [{**WHOLE, "loss_recovered": 0.95}] * 2}
TESTED = Tested(mean=0.5, low=0.4, high=0.6, p=0.0, q=0.0)


def write_seed(run: Path, seed: int, **facts: Any) -> None:
    directory = run / "crosscoder" / f"seed-{seed}"
    rundir.write_json(directory / "config.json", {"schema": 1, "dict_size": 100, **facts})
    rundir.finish(directory, "train", {}, {}, ["config.json"])


def write_analysis(run: Path, **facts: Any) -> None:
    directory = run / "analysis"
    summary = {"schema": 1, "dict_size": 100, "never_fired": 4, "quality": {"fve": [0.9, 0.9]}, "stability": None}
    rundir.write_json(directory / "summary.json", {**summary, **facts})
    rundir.finish(directory, "analyze", {}, {}, ["summary.json"])


def write_attribution(run: Path, **facts: Any) -> None:
    directory = run / "attribution"
    rundir.write_json(directory / "summary.json", {"schema": 2, "state": "checked", "tau": 0.05, **facts})
    rundir.finish(directory, "attribute", {}, {}, ["summary.json"])


def check(run: Path, name: trust.Name) -> Check:
    (found,) = run_checks(run, [name])
    assert found.name == name and found.says.endswith(".") and "\n" not in found.line()
    return found


def verdict(*rows: Verdict, state: str = "checked", tau_from: Any = None, tau: float = 0.05) -> VerdictFile:
    pair = {"name": "base→tuned", "kind": "pair", "runs": ["run"], "base": "b", "tuned": "t", "state": state}
    if state != "checked":
        pair |= {"reason": "the models are gone", "remedy": "fastdiff attribute run"}
    comparison = Comparison.model_validate({**pair, "rows": [row.model_dump() for row in rows]})
    facts = {"tau": tau, "tau_from": tau_from, "alpha": 0.05, "confidence": 0.95, "comparisons": [comparison]}
    return VerdictFile.model_validate({"schema": 1, **facts})


def row(word: str, **facts: Any) -> Verdict:
    change = "gained" if word == "confirmed" else "none"
    estimates = {"B": TESTED, "L": TESTED, "V": TESTED, "latents": Estimate(mean=0.5, low=0.4, high=0.6)}
    return Verdict(category="code", change=change, verdict=word, documents_nats=40, **estimates, **facts)


@pytest.mark.parametrize("name", COMPARED)
def test_an_empty_directory_is_not_checked_and_says_what_would(tmp_path: Path, name) -> None:
    found = check(tmp_path, name)
    assert (found.state == "not checked" and found.remedy and "fastdiff" in found.remedy) or "train" in found.remedy


@pytest.mark.parametrize(
    ("fve", "never_fired", "state", "says"),
    [
        ([0.9, 0.85], 4, "fine", "explains 0.80 and 0.85 of"),
        ([0.79, 0.85], 4, "poor", "explains 0.79 and 0.85 of"),
        ([None, 0.85], 4, "poor", "explains nothing and 0.85 of"),
        ([0.9, 0.85], 31, "poor", "31% of the latents fired nowhere in the text"),
    ],
)
def test_reconstruction_is_that_of_the_worst_seed(tmp_path: Path, fve, never_fired, state, says) -> None:
    write_seed(tmp_path, 0, quality={**FINE, "fve": [0.8, 0.99]})
    write_seed(tmp_path, 1, quality={**FINE, "fve": fve})
    write_analysis(tmp_path, never_fired=never_fired)
    found = check(tmp_path, "reconstruction")
    assert found.state == state and says in found.says and (found.remedy is None) == (state == "fine")


def test_reconstruction_of_an_older_crosscoder_is_that_of_its_analysis(tmp_path: Path) -> None:
    write_seed(tmp_path, 0)
    assert check(tmp_path, "reconstruction").state == "not checked"
    write_analysis(tmp_path, quality={"fve": [0.5, 0.9]})
    assert check(tmp_path, "reconstruction").state == "poor"


@pytest.mark.parametrize(
    ("facts", "state", "says"),
    [
        (LEFT_OUT, "fine", "28 rows (2.8%) with 50% and 48% of the variance were left out"),
        ({**LEFT_OUT, "rows": 0}, "fine", "No row has a norm over 3 times the median"),
        ({**LEFT_OUT, "max_norm": 0.0}, "not checked", "--max-norm 0"),
        (None, "not checked", "not known"),
    ],
)
def test_sinks(tmp_path: Path, facts, state, says) -> None:
    write_seed(tmp_path, 0, left_out=facts)
    found = check(tmp_path, "sinks")
    assert found.state == state and says in found.says and (found.remedy is None) == (state == "fine")


@pytest.mark.parametrize(("n", "state"), [(1, "not checked"), (2, "poor"), (3, "fine"), (5, "fine")])
def test_seeds(tmp_path: Path, n, state) -> None:
    for seed in range(n):
        write_seed(tmp_path, seed)
    write_analysis(tmp_path, stability={"exclusive": 60, "exclusive_stable": 45})
    found = check(tmp_path, "seeds")
    assert found.state == state
    assert (state == "fine") == ("60 latents that only one of the models has, 45 come back" in found.says)
    if state != "fine":
        assert found.remedy == (
            f"fastdiff train STORE -o {tmp_path} --seeds 0,1,2, then fastdiff attribute {tmp_path}, then "
            f"fastdiff analyze {tmp_path}, then fastdiff annotate {tmp_path}, and compare and report again"
        )


def test_a_command_names_the_store_that_the_run_was_trained_on(tmp_path: Path) -> None:
    manifest = {"schema": rundir.MANIFEST_SCHEMA, "stages": {"train": {"store": "/data/acts"}}}
    rundir.write_json(tmp_path / "manifest.json", manifest)
    assert "fastdiff train /data/acts -o" in str(check(tmp_path, "seeds").remedy)
    (by_name,) = run_checks(tmp_path, ["seeds"], called="it")
    assert "fastdiff train STORE -o it" in str(by_name.remedy)
    # as a shell takes it
    (tmp_path / "two words").mkdir()
    (quoted,) = run_checks(tmp_path / "two words", ["splice"])
    assert str(quoted.remedy).startswith(f"fastdiff analyze '{tmp_path}/two words' --splice")


def test_latents_that_no_text_makes_fire_ask_for_no_more_latents(tmp_path: Path) -> None:
    write_seed(tmp_path, 0, quality=FINE)
    write_analysis(tmp_path, never_fired=80)
    assert "fewer latents" in str(check(tmp_path, "reconstruction").remedy)
    write_analysis(tmp_path, never_fired=4)
    write_seed(tmp_path, 1, quality={**FINE, "fve": [0.5, 0.5]})
    assert "more latents" in str(check(tmp_path, "reconstruction").remedy)


@pytest.mark.parametrize(("shares", "state"), [((0.99, 0.9), "fine"), ((0.99, 0.89), "poor")])
def test_splice(tmp_path: Path, shares, state) -> None:
    write_analysis(tmp_path, splice={"models": [{**WHOLE, "loss_recovered": share} for share in shares]})
    assert check(tmp_path, "splice").state == state


def test_a_model_that_zeros_do_no_harm_says_nothing_of_a_reconstruction(tmp_path: Path) -> None:
    # an untrained crosscoder on a tiny model was once said to recover 457 % of the loss
    cheap = {"name": "tiny", "ce": 2.0, "ce_spliced": 1.8, "ce_zero": 2.05, "loss_recovered": 4.57}
    worse = {**cheap, "name": "odd", "ce_zero": 1.9, "loss_recovered": None}
    for models in ([cheap, worse], [{**WHOLE, "loss_recovered": 0.95}, cheap]):
        write_analysis(tmp_path, splice={"models": models})
        found = check(tmp_path, "splice")
        assert found.state == "not checked" and "tiny" in found.says and "457%" not in found.says
    write_analysis(tmp_path, splice={"models": [{**WHOLE, "loss_recovered": 0.5}, cheap]})
    assert check(tmp_path, "splice").state == "poor"


@pytest.mark.parametrize("name", ["ce", "ce_spliced", "ce_zero"])
def test_splice_of_a_model_that_gives_nan_is_not_checked(tmp_path: Path, name) -> None:
    broken = {**WHOLE, "name": "broken", "loss_recovered": None, name: None}
    write_analysis(tmp_path, splice={"models": [{**WHOLE, "loss_recovered": 0.95}, broken]})
    found = check(tmp_path, "splice")
    assert found.state == "not checked" and found.says.startswith("broken gave NaN or infinity")


@pytest.mark.parametrize(
    ("facts", "state", "says"),
    [
        ({"largest_gap": 0.021}, "fine", "within 2.1%"),
        ({"largest_gap": 0.031}, "poor", "within 3.1%"),
        ({"largest_gap": None}, "poor", "unknown"),
        ({"state": "not checked", "reason": "a model is gone", "remedy": "put it back"}, "not checked", "is gone"),
    ],
)
def test_attribution(tmp_path: Path, facts, state, says) -> None:
    write_attribution(tmp_path, **facts)
    found = check(tmp_path, "attribution")
    assert found.state == state and says in found.says


def of(tmp_path: Path, file: VerdictFile, name: str) -> Check:
    (trusted,) = compared({"run": tmp_path}, file)
    assert [one.name for one in trusted.checks] == [*COMPARED, "null", "power"]
    return next(one for one in trusted.checks if one.name == name)


@pytest.mark.parametrize(
    ("tau_from", "state"),
    [
        (None, "not checked"),
        ({"run": "aa", "largest": 0.04}, "fine"),
        # below the τ that was asked for, though above the default
        ({"run": "aa", "largest": 0.09, "tau": 0.2}, "fine"),
        ({"run": "aa", "largest": 0.09, "tau": 0.09}, "poor"),
    ],
)
def test_null(tmp_path: Path, tau_from, state) -> None:
    tau = tau_from.pop("tau", 0.05) if tau_from else 0.05
    found = of(tmp_path, verdict(row("confirmed"), tau_from=tau_from, tau=tau), "null")
    assert found.state == state and ("--null" in (found.remedy or "")) == (state == "not checked")


def test_the_command_for_a_null_calls_the_runs_by_their_paths(tmp_path: Path) -> None:
    found = of(tmp_path, verdict(row("confirmed")), "null")
    assert str(found.remedy).endswith(f"fastdiff compare {tmp_path} --null THAT_RUN")
    runs, of_two = {"a": tmp_path / "x a", "b": tmp_path / "y"}, verdict(row("confirmed"))
    two = of_two.comparisons[0].model_copy(update={"kind": "difference", "runs": ["a", "b"]})
    (trusted,) = compared(runs, of_two.model_copy(update={"comparisons": [two]}))
    null = next(check for check in trusted.checks if check.name == "null")
    assert str(null.remedy).endswith(f"fastdiff compare '{runs['a']}' {runs['b']} -o OUT --null THAT_RUN")
    (trusted,) = compared(runs, of_two.model_copy(update={"comparisons": [two]}), by_name=True)
    assert str(trusted.checks[0].remedy).endswith("fastdiff compare a b -o OUT --null THAT_RUN")


def test_power(tmp_path: Path) -> None:
    found = of(tmp_path, verdict(row("confirmed")), "power")
    assert found.state == "fine" and "on 40 traced documents or more" in found.says
    poor = verdict(row("confirmed"), row("cannot tell", reason="interval too wide", documents_needed=120))
    found = of(tmp_path, poor, "power")
    assert (
        found.state == "poor"
        and "1 of 2 categories could not be decided" in found.says
        and "120 documents" in str(found.remedy)
    )
    few = verdict(row("confirmed"), row("cannot tell", reason="too few traced documents"))
    assert of(tmp_path, few, "power").remedy == f"fastdiff attribute {tmp_path} with more --documents"
    found = of(tmp_path, verdict(state="not checked"), "power")
    assert found.state == "not checked" and found.remedy == "fastdiff attribute run"
    write_attribution(tmp_path, none_long_enough=["tiny", "ink"])
    found = of(tmp_path, verdict(row("confirmed")), "power")
    assert (
        found.state == "poor"
        and found.says == "There is no row of tiny, ink: none of the documents has two scored tokens."
    )
    assert "Besides, code could not be decided." in of(tmp_path, verdict(row("cannot tell")), "power").says


def test_where_neither_model_has_anything_nothing_was_decided(tmp_path: Path) -> None:
    found = of(tmp_path, verdict(row("neither has it"), row("neither has it")), "power")
    assert found.state == "poor" and found.remedy and "Neither model predicts any category" in found.says
    found = of(tmp_path, verdict(row("confirmed"), row("neither has it")), "power")
    assert found.state == "fine" and "Of code nothing can be said" in found.says


def test_green_needs_all(tmp_path: Path) -> None:
    for seed in range(3):
        write_seed(tmp_path, seed, quality=FINE, left_out=LEFT_OUT)
    write_analysis(tmp_path, splice=SPLICE)
    write_attribution(tmp_path, largest_gap=0.01)
    null = {"run": "aa", "largest": 0.03}
    (trusted,) = compared({"run": tmp_path}, verdict(row("confirmed"), tau_from=null))
    assert trusted.state == "fine" and trusted.sentence() == "All 7 checks are fine."
    (trusted,) = compared({"run": tmp_path}, verdict(row("confirmed")))
    assert trusted.state == "not checked" and "1 was not checked" in trusted.sentence()
    both = Trusted(of="x", checks=[Check(name="null", state="poor", says="a."), trusted.checks[5]])
    assert (
        both.state == "poor"
        and both.sentence() == "Of 2 checks, 1 is poor and 1 was not checked: read the result with care."
    )
