"""Lean and norm ratio of categories, from the files of an analysis, against numbers counted by hand."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy import stats

from fastdiff import rundir
from fastdiff.comparison.activations import activation_rows, token_labels
from fastdiff.comparison.evidence import run_evidence, verdict_file
from fastdiff.comparison.verdict import rank_z
from fastdiff.config import CompareConfig
from fastdiff.errors import InputError, OptionError
from fastdiff.results.analysis import LATENT_COLUMNS
from fastdiff.results.attribution import Attribution, DocumentTable, Summary, write_attribution
from fastdiff.results.verdict import lines

TOKENS = np.array([1000, 1000, 1000])


@pytest.mark.parametrize(
    ("firings", "documents", "label"),
    [
        ([20, 5, 5], [3, 2, 2], 0),  # four times the rate of the others
        ([20, 10, 10], [3, 2, 2], 0),  # exactly twice
        ([20, 11, 10], [3, 2, 2], -1),  # just below
        ([20, 5, 5], [2, 2, 2], -1),  # too few documents of the category
        ([0, 9, 0], [0, 5, 0], -1),  # too rare
        ([0, 10, 0], [0, 5, 0], 1),
        ([0, 0, 0], [0, 0, 0], -1),
    ],
)
def test_a_label_needs_lift_firings_and_documents(firings, documents, label):
    assert token_labels(np.array([firings]), np.array([documents]), TOKENS).tolist() == [label]


def analysed(run, n=12, sources=("a", "b", "b"), energy=((4.0, 9.0), (1.0, 1.0), (3.0, 0.0))):
    """n latents for category a that only tuned has, and n for b that both have; two sources are of b."""
    directory = run / "analysis"
    directory.mkdir(parents=True)
    firings = np.array([[30, 0, 0]] * n + [[0, 15, 15]] * n)
    with (directory / "latents.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, list(LATENT_COLUMNS), restval="")
        writer.writeheader()
        for i in range(2 * n):
            writer.writerow({"latent": i, "unmatched": 0.72 if i < n else 0.0008 * i, "count": 30})
    save_file({"count_by_source": firings, "documents_by_source": firings // 5}, directory / "firing.safetensors")
    facts = {"schema": 1, "tokens_by_source": [1000, 500, 500], "energy_by_source": [list(e) for e in energy]}
    facts["sources"] = [{"dataset": "d", "category": category} for category in sources]
    rundir.write_json(directory / "summary.json", facts)
    rundir.finish(directory, "analyze", {}, {}, ["latents.csv", "summary.json", "firing.safetensors"])
    return run


def attributed(run, n=20, names=("a", "b")):
    """Both models behave alike in both categories, and nothing runs through the latents."""
    numbers = np.arange(2 * n)
    noise = np.tile(np.linspace(-1e-3, 1e-3, n), 2)
    one = np.zeros((1, 2 * n))
    table = DocumentTable(
        document=numbers, text=numbers, category=numbers // n, held_out=numbers < 0, scored=numbers * 0 + 9,
        ce=np.stack([2 + noise, np.full(2 * n, 2.0)], axis=1), has_nats=numbers >= 0, layer=noise,
        steps=numbers * 0 + 3, latents=one + noise / 2, offset=one, error=one, left_out=noise * 0, bos=noise * 0,
    )  # fmt: skip
    summary = Summary(
        state="checked", tau=0.05, seeds=[0], categories=list(names), unigram_entropy=dict.fromkeys(names, 5.0),
        dict_size=3,
    )  # fmt: skip
    outputs = write_attribution(run / "attribution", Attribution(summary, table, np.zeros((1, 2 * n, 3), np.float32)))
    rundir.finish(run / "attribution", "attribute", {}, {}, outputs)
    return run


def test_a_category_of_one_run_only_is_named(tmp_path):
    found = [
        evidence_of(attributed(analysed(tmp_path / name), names=names), name)
        for name, names in (("one", ("a", "b")), ("two", ("a", "law")))
    ]
    difference = verdict_file(found, CompareConfig(), None).comparisons[-1]
    assert [row.category for row in difference.rows] == ["a"] and len(difference.sentences) <= 3
    assert difference.sentences[-1].endswith("In one run only, so not compared: b, law.")


def evidence_of(run, name="it"):
    return run_evidence(run, name=name, base="base", tuned="tuned", activations=activation_rows(run, alpha=0.05))


def decided(run):
    return verdict_file([evidence_of(run)], CompareConfig(), None)


def test_lean_and_norm_ratio_are_those_counted_by_hand(tmp_path):
    first, second = activation_rows(analysed(tmp_path / "run"), alpha=0.05)
    assert (first.category, first.lean, second.category, second.lean) == ("a", "tuned", "b", "base")
    assert (first.norm_ratio, second.norm_ratio) == pytest.approx((1.5, 0.5))
    # all latents of a lie above all of b
    a, b = np.full(12, 0.72), 0.0008 * np.arange(12, 24)
    p = stats.mannwhitneyu(a, b, use_continuity=False, method="asymptotic")
    assert 2 * stats.norm.sf(rank_z(a, b)) == pytest.approx(p.pvalue)


def test_without_attribution_rows_lean_and_never_gain_or_lose(tmp_path):
    run = analysed(tmp_path / "run")
    file = decided(run)
    (pair,) = file.comparisons
    assert pair.state == "not checked" and pair.remedy == f"fastdiff attribute {run}"
    assert [(row.category, row.change, row.verdict, row.lean) for row in pair.rows] == [
        ("a", "none", "cannot tell", "tuned"),
        ("b", "none", "cannot tell", "base"),
    ]
    assert [row.norm_ratio for row in pair.rows] == pytest.approx([1.5, 0.5]) and pair.rows[0].B is None
    assert pair.sentences[1].endswith("say nothing of behaviour, latents lean: a to tuned, b to base.")
    assert any(line.endswith("leans to tuned (activations only)") for line in lines(file))


def test_few_labelled_latents_cannot_lean(tmp_path):
    (pair,) = decided(analysed(tmp_path / "run", n=4)).comparisons
    assert [row.lean for row in pair.rows] == [None, None] and len(pair.sentences) == 1


def test_what_behaves_alike_but_leans_is_composition_only_and_in_no_sentence(tmp_path):
    run = attributed(analysed(tmp_path / "run"))
    (pair,) = decided(run).comparisons
    assert [(row.change, row.verdict, row.lean) for row in pair.rows] == [
        ("none", "composition only", "tuned"),
        ("none", "composition only", "base"),
    ]
    assert [row.norm_ratio for row in pair.rows] == pytest.approx([1.5, 0.5])
    assert not any("composition" in sentence or "lean" in sentence for sentence in pair.sentences)
    plain = attributed(analysed(tmp_path / "plain", n=4))
    assert [row.verdict for row in decided(plain).comparisons[0].rows] == ["no change", "no change"]


def test_an_analysis_of_an_earlier_version_names_the_command(tmp_path):
    run = analysed(tmp_path / "run")
    path = run / "analysis" / "summary.json"
    facts = rundir.read_json(path, 1)
    del facts["energy_by_source"]
    rundir.write_json(path, facts)
    with pytest.raises(InputError, match=r"earlier version.*run `fastdiff analyze"):
        activation_rows(run, alpha=0.05)


def changed(of, *, ce=0.0, L=0.0, summary=None):
    """Evidence with another cross entropy of base, behaviour and L, or summary."""
    categories = [
        replace(item, base_ce=item.base_ce + ce, behaviour=item.behaviour + L, ce=item.ce + ce, layer=item.layer + L)
        for item in of.categories
    ]
    return replace(of, categories=categories, summary=of.summary.model_copy(update=summary or {}))


def test_a_null_run_raises_tau_and_one_that_cannot_is_refused(tmp_path):
    run, null = (evidence_of(attributed(analysed(tmp_path / name)), name) for name in ("run", "null"))
    config = CompareConfig(null_run="null")
    file = verdict_file([run], config, changed(null, L=0.2))
    assert file.tau == pytest.approx(0.2, abs=0.01) and file.tau_from.largest == pytest.approx(file.tau)
    for summary, words in (
        ({"layer": 7}, "reads another layer than run"),
        ({"hook": "mlp_out"}, "reads another hook"),
        ({"scored": "answers"}, "scores other tokens"),
    ):
        with pytest.raises(OptionError, match=words):
            verdict_file([run], config, changed(null, L=0.2, summary=summary))
    with pytest.raises(OptionError, match="has another base model than run; give a run of the same kind"):
        verdict_file([run], config, changed(null, ce=0.1, L=0.2))
    # nobody masters a text of 20 nats a token
    with pytest.raises(InputError, match="no category that either model masters has 8 documents, so it shows nothing"):
        verdict_file([run], config, replace(null, categories=[replace(c, ce=c.ce + 20) for c in null.categories]))
    few = [replace(c, behaviour=c.behaviour[:7]) for c in null.categories]
    with pytest.raises(InputError, match="has 8 documents"):
        verdict_file([run], config, replace(null, categories=few))
    same = [replace(c, behaviour=c.behaviour * 0, latents=c.latents * 0, offset=c.offset * 0) for c in null.categories]
    with pytest.raises(InputError, match="behave exactly alike"):
        verdict_file([run], config, replace(null, categories=same))


def test_documents_that_were_not_traced_are_no_reason_for_more_text(tmp_path):
    of = evidence_of(attributed(analysed(tmp_path / "run")))
    few = [replace(c, layer=c.layer[:5], latents=c.latents[:, :5], offset=c.offset[:, :5]) for c in of.categories]
    (pair,) = verdict_file([replace(of, categories=few)], CompareConfig(), None).comparisons
    assert {(row.reason, row.documents_needed) for row in pair.rows} == {("too few traced documents", None)}
