"""The annotation stage on made-up analyses."""

import csv
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastdiff import rundir
from fastdiff.analysis.analyze import OUTPUTS
from fastdiff.annotation.annotate import annotate
from fastdiff.config import AnnotateConfig
from fastdiff.errors import InputError, LockedError
from fastdiff.results.analysis import LATENT_COLUMNS as COLUMNS
from fastdiff.results.labels import UNINTERPRETABLE, read_labels
from fastdiff.results.seeds import SeedLatents, write_seed_latents

CONFIG = AnnotateConfig()
SOURCES = [("a.jsonl", "code"), ("b.jsonl", "law"), ("b.jsonl", "code"), ("plain.txt", None)]
DOCUMENTS = [50, 100, 50, 100]
FIRED = [[20, 0, 20, 1], [0, 60, 1, 0], [0, 0, 0, 40], [10, 20, 10, 20], [30, 0, 30, 0]]
TABLES = ("count_by_source", "documents_by_source", "mean_by_source", "squares_by_source", "peaks_by_source")
COUNT = [400, 100, 80, 900, 9]


def analysis(
    run, *, sources=SOURCES, documents=DOCUMENTS, fired=FIRED, count=COUNT, tokens=None, by_nats=(), seeds=None
):
    """A finished analysis with the columns and files that annotation reads; all firings are equally strong."""
    directory = run / "analysis"
    rundir.begin(directory)
    with (directory / "latents.csv").open("w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(COLUMNS), restval="", lineterminator="\n")
        writer.writeheader()
        for latent, n in enumerate(count):
            top = json.dumps(tokens or [f"t{latent}"], ensure_ascii=False)
            writer.writerow({"latent": latent, "count": n, "top_tokens": top})
    summary = {
        "schema": 1,
        "sources": [{"dataset": dataset, "category": category} for dataset, category in sources],
        "documents_by_source": documents,
        "by_nats": list(by_nats),
    }
    rundir.write_json(directory / "summary.json", summary)
    table = np.array(fired, np.int64)
    tables = {name: table if name.startswith(("count", "documents")) else table.astype(float) for name in TABLES}
    save_file(tables, directory / "firing.safetensors")
    (directory / "examples.sqlite").write_bytes(b"")
    write_seed_latents(directory, seeds or SeedLatents.none(len(documents)))
    rundir.finish(directory, "analyze", {}, {"model": "0"}, OUTPUTS)
    return run


def test_sources_of_one_category_are_one_and_a_source_without_stands_for_itself(tmp_path):
    run = analysis(tmp_path / "run")
    assert annotate(run, CONFIG) == run / "annotate"
    labels = read_labels(run)
    assert {latent: label.category for latent, label in labels.items()} == {
        0: "code",
        1: "law",
        2: "plain.txt",
        3: UNINTERPRETABLE,
    }
    assert labels[0].label == "code: t0" and labels[0].top_tokens == ["t0"]


def test_the_same_category_from_two_sources_counts_as_from_one(tmp_path):
    split = analysis(tmp_path / "split")
    merged = analysis(
        tmp_path / "merged",
        sources=[("x", "code"), ("x", "law"), ("plain.txt", None)],
        documents=[100, 100, 100],
        fired=[[a + c, b, d] for a, b, c, d in FIRED],
    )
    for run in (split, merged):
        annotate(run, CONFIG)
    texts = [(run / "annotate" / "labels.jsonl").read_bytes() for run in (split, merged)]
    assert texts[0] == texts[1]


def test_each_line_is_json_with_the_promised_keys(tmp_path):
    run = analysis(tmp_path / "run")
    annotate(run, CONFIG)
    text = (run / "annotate" / "labels.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    for line in text.rstrip("\n").split("\n"):
        assert list(json.loads(line)) == [
            "latent",
            "label",
            "category",
            "confidence",
            "annotator",
            "top_tokens",
        ]


def test_a_latent_that_a_row_of_the_verdict_shows_has_a_label_however_rare(tmp_path):
    run = analysis(tmp_path / "run", by_nats=[0, 4])
    annotate(run, CONFIG)
    labels = read_labels(run)
    assert labels[4].label == "no one category: t4" and labels[4].category == UNINTERPRETABLE
    assert labels[0].category == "code"


def test_an_analysis_that_counted_documents_alone_is_refused_with_the_command(tmp_path):
    run = analysis(tmp_path / "run")
    table = np.array(FIRED, np.int64)
    save_file({"documents_by_source": table, "count_by_source": table}, run / "analysis" / "firing.safetensors")
    rundir.finish(run / "analysis", "analyze", {}, {"model": "0"}, OUTPUTS)
    with pytest.raises(InputError, match=f"has no mean_by_source; run `fastdiff analyze {run}` again"):
        annotate(run, CONFIG)


def test_a_data_set_without_sources_is_uninterpretable(tmp_path):
    run = analysis(tmp_path / "run", sources=[], documents=[300], fired=[[40]] * 5)
    annotate(run, CONFIG)
    assert {label.category for label in read_labels(run).values()} == {UNINTERPRETABLE}


def test_hostile_names_and_tokens_survive(tmp_path):
    # str.splitlines, unlike JSON lines, splits at U+0085, U+2028 and U+2029
    hostile = 'a\u2028b\x85c\u2029d\x0b\x1c\r\n"<script>,\x00\u202e\U0001f600'
    sources = [("x", hostile), ("x", "law")]
    run = analysis(
        tmp_path / "run",
        sources=sources,
        documents=[100, 100],
        fired=[[50, 0]],
        count=[50],
        tokens=[hostile, "\x85"],
    )
    annotate(run, CONFIG)
    label = read_labels(run)[0]
    assert label.category == hostile and label.top_tokens == [hostile, "\x85"]


def test_a_second_run_is_skipped_and_a_forced_one_gives_the_same_bytes(tmp_path, monkeypatch):
    run = analysis(tmp_path / "run")
    annotate(run, CONFIG)
    files = {name: (run / "annotate" / name).read_bytes() for name in ("labels.jsonl", "DONE.json")}
    with monkeypatch.context() as patch:
        patch.setattr("fastdiff.annotation.annotate.annotate_baseline", None)  # calling it fails
        annotate(run, CONFIG)
        with pytest.raises(TypeError):
            annotate(run, AnnotateConfig(min_count=11))
    annotate(run, CONFIG)
    assert {name: (run / "annotate" / name).read_bytes() for name in files} == files


def test_another_configuration_or_analysis_is_labelled_anew(tmp_path):
    run = analysis(tmp_path / "run")
    annotate(run, CONFIG)
    annotate(run, AnnotateConfig(min_count=1))
    assert set(read_labels(run)) == {0, 1, 2, 3, 4}
    analysis(run, count=[1] * 5)
    annotate(run, CONFIG)
    assert read_labels(run) == {}


def test_what_it_ran_with_is_recorded(tmp_path):
    run = analysis(tmp_path / "run")
    annotate(run, CONFIG)
    assert "min_lift: 2.0" in (run / "fastdiff.yaml").read_text()
    assert "annotate" in rundir.read_manifest(run)["stages"]


def test_a_missing_or_changed_analysis_is_refused_with_the_command(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(InputError, match=f"run `fastdiff analyze {run}` first"):
        annotate(run, CONFIG)
    analysis(run)
    with (run / "analysis" / "latents.csv").open("a") as f:
        f.write("5\n")
    with pytest.raises(InputError, match=f"latents.csv: gone or changed .* `fastdiff analyze {run}` again"):
        annotate(run, CONFIG)
    assert not (run / "annotate").exists()


def test_labels_are_refused_when_missing_or_changed(tmp_path):
    run = analysis(tmp_path / "run")
    with pytest.raises(InputError, match=f"run `fastdiff annotate {run}` first"):
        read_labels(run)
    annotate(run, CONFIG)
    (run / "annotate" / "labels.jsonl").write_text("")
    with pytest.raises(InputError, match="gone or changed"):
        read_labels(run)


def test_a_run_that_another_writes_to_is_refused_even_before_its_analysis_is_there(tmp_path):
    for run in (analysis(tmp_path / "done"), tmp_path / "midway"):
        with rundir.locked(run), pytest.raises(LockedError):
            annotate(run, CONFIG)
