"""The comparison stage on made-up runs with counts known by hand."""

import csv
import json
import math
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy import stats

from fastdiff import rundir
from fastdiff.analysis.analyze import OUTPUTS
from fastdiff.comparison.compare import compare
from fastdiff.config import CompareConfig
from fastdiff.errors import InputError, LockedError, OptionError
from fastdiff.results.analysis import LATENT_COLUMNS as COLUMNS
from fastdiff.results.labels import UNINTERPRETABLE
from fastdiff.results.seeds import SeedLabel, write_seed_labels

CONFIG = CompareConfig()
HEADER = (
    "comparison,category,side_a,side_b,signs,count_a,total_a,share_a,count_b,total_b,share_b,delta_percent,percent_low,"
    "percent_high,delta_points,points_low,points_high,p,q,q_concepts,detectable_ratio,"
    "mass_a,mass_b,pooled_count_a,pooled_total_a,pooled_count_b,pooled_total_b,pooled_p,pooled_q,significant"
)


def fake_run(run, latents, *, base="models/base", tuned="models/it", weights=None, seeds=None):
    """A finished, annotated run. `latents` are (specific, category or None, how many), those of other `seeds` too."""
    analysis, target = run / "analysis", run / "annotate"
    rundir.begin(analysis)
    labels, n = [], 0
    with (analysis / "latents.csv").open("w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(COLUMNS), restval="", lineterminator="\n")
        writer.writeheader()
        for specific, category, how_many in latents:
            for _ in range(how_many):
                fired = {"count": n + 1, "mean_activation": 0.5} if specific else {"count": 0}
                writer.writerow({"latent": n, "specific": specific, **fired})
                if category is not None:
                    labels.append({"latent": n, "label": "", "category": category, "confidence": 1.0})
                n += 1
    models = [{"name": base, "revision": None, "weights_sha256": weights}, {"name": tuned, "revision": None}]
    facts = {"schema": 1, "models": models, "sources": [], "energy_by_source": [], **QUALITY}
    facts["seeds"] = {"analysed": 0, "others": list(seeds or {})}
    rundir.write_json(analysis / "summary.json", facts)
    for name in OUTPUTS[2:]:
        (analysis / name).write_bytes(b"")
    rundir.finish(analysis, "analyze", {}, {"store": rundir.sha256_text(base)}, OUTPUTS)
    done = rundir.require_done(analysis, "")
    rundir.begin(target)
    lines = [json.dumps({**label, "annotator": "x", "top_tokens": []}, ensure_ascii=False) + "\n" for label in labels]
    rundir.write_text(target / "labels.jsonl", "".join(lines))
    rows = [
        SeedLabel(seed, i, side, i, category or "")
        for seed, of in (seeds or {}).items()
        for i, (side, category) in enumerate((side, category) for side, category, n in of for _ in range(n) if side)
    ]
    write_seed_labels(run, rows)
    rundir.finish(target, "annotate", {}, done["outputs"], ["labels.jsonl", "seeds.csv"])
    return run


QUALITY = {"quality": {"fve": [0.9, 0.9]}, "never_fired": 0, "dict_size": 200}
CHANGED = [
    ("base", "code", 40),
    ("base", "law", 5),
    ("base", "math", 15),
    ("base", UNINTERPRETABLE, 6),
    ("tuned", "code", 4),
    ("tuned", "law", 30),
    ("tuned", "math", 10),
    ("tuned", UNINTERPRETABLE, 3),
    ("tuned", None, 2),
    ("", "code", 50),
    ("", "chess", 7),
    ("", None, 20),
]
SAME = [(side, category, n) for side in ("base", "tuned") for category, n in (("code", 20), ("law", 11), ("math", 9))]


def table(directory):
    """Rows by (comparison, category)."""
    with (directory / "compare" / "categories.csv").open(encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    found = {(row["comparison"], row["category"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def counts(row):
    return tuple(int(row[name]) for name in ("count_a", "total_a", "count_b", "total_b"))


class TestOneRun:
    @pytest.fixture
    def run(self, tmp_path):
        run = fake_run(tmp_path / "it", CHANGED)
        assert compare([run], run, CONFIG) == run / "compare"
        return run

    def test_counts_are_those_of_the_exclusive_latents(self, run):
        assert {key: counts(row) for key, row in table(run).items()} == {
            ("base→tuned", "code"): (40, 66, 4, 49),
            ("base→tuned", "law"): (5, 66, 30, 49),
            ("base→tuned", "math"): (15, 66, 10, 49),
            ("base→tuned", "chess"): (0, 66, 0, 49),
            ("base→tuned", UNINTERPRETABLE): (6, 66, 3, 49),
            ("base→tuned", "unlabelled"): (0, 66, 2, 49),
        }

    def test_the_header_is_the_promised_one(self, run):
        assert (run / "compare" / "categories.csv").read_text(encoding="utf-8").split("\n")[0] == HEADER

    def test_numbers_follow_from_the_counts(self, run):
        row = table(run)["base→tuned", "law"]
        assert (row["side_a"], row["side_b"]) == ("only base", "only it")
        assert float(row["share_a"]) == pytest.approx(5 / 66, rel=1e-5)
        assert float(row["share_b"]) == pytest.approx(30 / 49, rel=1e-5)
        assert float(row["delta_points"]) == pytest.approx(100 * (30 / 49 - 5 / 66), rel=1e-5)
        assert float(row["delta_percent"]) == pytest.approx(100 * (30 / 49 / (5 / 66) - 1), rel=1e-5)
        assert float(row["points_low"]) < float(row["delta_points"]) < float(row["points_high"])
        assert float(row["percent_low"]) < float(row["delta_percent"]) < float(row["percent_high"])
        assert float(row["p"]) < float(row["q"]) < 1e-6

    def test_only_tested_categories_have_a_q_and_only_small_ones_are_significant(self, run):
        rows = {category: row for (_, category), row in table(run).items()}
        assert {category for category, row in rows.items() if not row["q"]} == {UNINTERPRETABLE, "unlabelled"}
        assert {category for category, row in rows.items() if row["significant"] == "1"} == {"code", "law"}
        assert {row["significant"] for row in rows.values()} == {"0", "1"}
        tested = [row for row in rows.values() if row["q"]]
        expected = stats.false_discovery_control([float(row["p"]) for row in tested])
        assert [float(row["q"]) for row in tested] == pytest.approx(expected, rel=1e-4)

    def test_undefined_cells_are_empty(self, run):
        row = table(run)["base→tuned", "chess"]
        assert row["delta_percent"] == "" and float(row["delta_points"]) == 0 and row["p"] == "1"

    def test_mass_is_the_share_of_firings_times_strength(self, run):
        # latent n fires n + 1 times at strength ½
        masses, n = {"base": Counter(), "tuned": Counter()}, 0
        for side, category, how_many in CHANGED:
            for _ in range(how_many):
                if side:
                    masses[side][category or "unlabelled"] += (n + 1) / 2
                n += 1
        for (_, category), row in table(run).items():
            assert float(row["mass_a"]) == pytest.approx(masses["base"][category] / masses["base"].total(), rel=1e-5)
            assert float(row["mass_b"]) == pytest.approx(masses["tuned"][category] / masses["tuned"].total(), rel=1e-5)

    def test_the_verdict_names_what_changed_and_which_way(self, run):
        gained, lost = rundir.read_json(run / "compare" / "statistics.json", 3)["verdict"]
        assert gained.startswith("Gained from base to it: law (30/49 against 5/66 latents, q = ")
        assert lost.startswith("Lost from base to it: code (4/49 against 40/66 latents, q = ")
        for sentence in (gained, lost):
            assert "math" not in sentence and "unlabelled" not in sentence and "\n" not in sentence

    def test_statistics_say_what_was_compared(self, run):
        found = rundir.read_json(run / "compare" / "statistics.json", 3)
        assert (found["schema"], found["kind"], found["alpha"], found["confidence"]) == (
            3,
            "pair",
            0.05,
            0.95,
        )
        assert found["runs"] == [{"name": "it", "path": ".", "base": "base", "tuned": "it"}]
        (comparison,) = found["comparisons"]
        assert (comparison["total_a"], comparison["total_b"]) == (66, 49)
        assert (comparison["unlabelled_a"], comparison["unlabelled_b"]) == (6, 5)
        assert comparison["n_categories"] == 4

    def test_it_is_recorded(self, run):
        assert "compare" in rundir.read_manifest(run)["stages"]
        assert "alpha: 0.05" in (run / "fastdiff.yaml").read_text()


def test_swapped_models_turn_gains_into_losses(tmp_path):
    other = {"base": "tuned", "tuned": "base", "": ""}
    run = fake_run(tmp_path / "r", [(other[side], category, n) for side, category, n in CHANGED])
    compare([run], run, CONFIG)
    gained, lost = rundir.read_json(run / "compare" / "statistics.json", 3)["verdict"]
    assert "Gained from base to it: code (40/66 against 4/49" in gained
    assert "Lost from base to it: law (5/66 against 30/49" in lost


def test_equal_sides_do_not_differ(tmp_path):
    run = fake_run(tmp_path / "r", SAME)
    compare([run], run, CONFIG)
    (sentence,) = rundir.read_json(run / "compare" / "statistics.json", 3)["verdict"]
    assert sentence == ("base→tuned: no category differs beyond noise (q < 0.05, 3 categories, 40 latents against 40).")


@pytest.mark.parametrize(("side", "empty"), [("tuned", "only base"), ("base", "only it")])
def test_a_side_without_latents_is_said_so(tmp_path, side, empty):
    run = fake_run(tmp_path / "r", [(side, "code", 5), ("", "law", 3)])
    compare([run], run, CONFIG)
    (sentence,) = rundir.read_json(run / "compare" / "statistics.json", 3)["verdict"]
    assert repr(empty) in sentence and "cannot be compared" in sentence
    row = table(run)["base→tuned", "code"]
    assert row["delta_points"] == "" and row["q"] == "1" and row["significant"] == "0"


def test_no_latents_at_all(tmp_path):
    run = fake_run(tmp_path / "r", [("", None, 3)])
    compare([run], run, CONFIG)
    assert table(run) == {}
    assert "cannot be compared" in rundir.read_json(run / "compare" / "statistics.json", 3)["verdict"][0]


def test_without_any_category_nothing_is_claimed(tmp_path):
    run = fake_run(tmp_path / "r", [("base", UNINTERPRETABLE, 40), ("tuned", None, 40)])
    compare([run], run, CONFIG)
    (sentence,) = rundir.read_json(run / "compare" / "statistics.json", 3)["verdict"]
    assert "the text has no categories" in sentence and "--category-field" in sentence
    assert all(row["significant"] == "0" for row in table(run).values())


def test_alpha_decides_what_is_significant(tmp_path):
    run = fake_run(tmp_path / "r", CHANGED)
    compare([run], run, CompareConfig(alpha=1e-30))
    assert (
        "no category differs beyond noise (q < 1e-30"
        in rundir.read_json(run / "compare" / "statistics.json", 3)["verdict"][0]
    )


def test_models_of_one_name_can_be_told_apart(tmp_path):
    run = fake_run(tmp_path / "r", CHANGED, base="a/model", tuned="b/model")
    compare([run], run, CONFIG)
    row = table(run)["base→tuned", "code"]
    assert (row["side_a"], row["side_b"]) == ("only model (base)", "only model (tuned)")


HOSTILE = [
    'a,"b"',
    "new\nline",
    "carriage\rreturn",
    "\r\n",
    "=1+1",
    "<script>",
    "\u2028\x85",
    "",
    "  ",
    "é😀",
    "\x00",
]


def test_hostile_category_names_survive(tmp_path):
    run = fake_run(tmp_path / "r", [(side, name, 3) for name in HOSTILE for side in ("base", "tuned")])
    compare([run], run, CONFIG)
    assert {category for _, category in table(run)} == set(HOSTILE)
    assert all(counts(row) == (3, 33, 3, 33) for row in table(run).values())
    rundir.read_json(run / "compare" / "statistics.json", 3)


IT = [
    ("base", "code", 40),
    ("base", "law", 20),
    ("tuned", "code", 5),
    ("tuned", "law", 45),
    ("tuned", None, 2),
]
SIMPO = [("base", "code", 10), ("base", "law", 50), ("tuned", "code", 30), ("tuned", "math", 22)]


class TestTwoRuns:
    @pytest.fixture
    def runs(self, tmp_path):
        return [
            fake_run(tmp_path / "it", IT, tuned="models/it"),
            fake_run(tmp_path / "simpo", SIMPO, tuned="models/simpo"),
        ]

    def test_each_run_and_what_they_gained_and_lost_are_compared(self, runs, tmp_path):
        assert compare(runs, tmp_path / "out", CONFIG) == tmp_path / "out" / "compare"
        found = {key: counts(row) for key, row in table(tmp_path / "out").items()}
        assert found == {
            ("it", "code"): (40, 60, 5, 52),
            ("it", "law"): (20, 60, 45, 52),
            ("it", "unlabelled"): (0, 60, 2, 52),
            ("simpo", "code"): (10, 60, 30, 52),
            ("simpo", "law"): (50, 60, 0, 52),
            ("simpo", "math"): (0, 60, 22, 52),
            ("gained", "code"): (5, 52, 30, 52),
            ("gained", "law"): (45, 52, 0, 52),
            ("gained", "math"): (0, 52, 22, 52),
            ("gained", "unlabelled"): (2, 52, 0, 52),
            ("lost", "code"): (40, 60, 10, 60),
            ("lost", "law"): (20, 60, 50, 60),
            ("lost", "math"): (0, 60, 0, 60),
        }
        row = table(tmp_path / "out")["lost", "law"]
        assert (row["side_a"], row["side_b"]) == ("lost by it", "lost by simpo")

    def test_the_verdict_has_the_right_direction(self, runs, tmp_path):
        compare(runs, tmp_path / "out", CONFIG)
        verdict = "\n".join(rundir.read_json(tmp_path / "out" / "compare" / "statistics.json", 3)["verdict"])
        assert "Gained more by simpo than by it: code (30/52 against 5/52" in verdict
        assert "Gained less by simpo than by it: law (0/52 against 45/52" in verdict
        assert "Lost more by simpo than by it: law (50/60 against 20/60" in verdict
        assert "Lost less by simpo than by it: code (10/60 against 40/60" in verdict
        assert "Gained from base to it: law (45/52 against 20/60" in verdict

    def test_statistics_lead_back_to_the_runs(self, runs, tmp_path):
        out = tmp_path / "deep" / "out"
        compare(runs, out, CONFIG)
        found = rundir.read_json(out / "compare" / "statistics.json", 3)
        assert found["kind"] == "triangulated"
        assert [c["name"] for c in found["comparisons"]] == ["it", "simpo", "gained", "lost"]
        for described, run in zip(found["runs"], runs, strict=True):
            assert (out / described["path"]).resolve() == run.resolve()
        assert [run["tuned"] for run in found["runs"]] == ["it", "simpo"]

    def test_paths_lead_back_through_a_linked_directory(self, runs, tmp_path):
        (tmp_path / "far" / "away").mkdir(parents=True)
        (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
        compare(runs, tmp_path / "link", CONFIG)
        paths = [run["path"] for run in rundir.read_json(tmp_path / "link" / "compare" / "statistics.json", 3)["runs"]]
        assert [(tmp_path / "link" / path / "analysis").is_dir() for path in paths] == [True, True]

    def test_runs_that_moved_are_compared_anew(self, runs, tmp_path):
        compare(runs, tmp_path / "out", CONFIG)
        (tmp_path / "new").mkdir()
        moved = [run.rename(tmp_path / "new" / run.name) for run in runs]
        compare(moved, tmp_path / "out", CONFIG)
        assert rundir.read_json(tmp_path / "out" / "compare" / "statistics.json", 3)["runs"][0]["path"] == "../new/it"

    def test_names_may_be_given_and_equal_ones_are_numbered(self, runs, tmp_path):
        compare(runs, tmp_path / "out", CONFIG, names=["x", "y"])
        assert {comparison for comparison, _ in table(tmp_path / "out")} == {"x", "y", "gained", "lost"}
        twin = fake_run(tmp_path / "other" / "it", SIMPO)
        compare([runs[0], twin], tmp_path / "out2", CONFIG)
        assert {"it (1)", "it (2)"} < {comparison for comparison, _ in table(tmp_path / "out2")}

    def test_different_bases_are_refused_and_an_earlier_comparison_stays(self, runs, tmp_path):
        out = tmp_path / "out"
        compare(runs, out, CONFIG)
        before = (out / "compare" / "DONE.json").read_bytes()
        other = fake_run(tmp_path / "other", IT, base="models/another")
        with pytest.raises(
            OptionError, match=r"it and other have different base models, layers or hooks \(base, another\)"
        ):
            compare([runs[0], other], out, CONFIG)
        assert (out / "compare" / "DONE.json").read_bytes() == before

    def test_bases_are_the_same_by_their_weights_not_their_path(self, tmp_path):
        same = [fake_run(tmp_path / n, IT, base=f"{n}/base", weights="aa") for n in ("r1", "r2")]
        compare(same, tmp_path / "out", CONFIG)
        differ = [fake_run(tmp_path / f"d{w}", IT, weights=w) for w in ("aa", "bb")]
        with pytest.raises(OptionError, match="different base models"):
            compare(differ, tmp_path / "out", CONFIG)

    def test_three_runs_and_none_are_refused(self, runs, tmp_path):
        for chosen in ([*runs, runs[0]], []):
            with pytest.raises(OptionError, match=f"one run or two, got {len(chosen)}"):
                compare(chosen, tmp_path / "out", CONFIG)

    def test_a_run_is_not_overwritten_with_the_comparison(self, runs):
        with pytest.raises(OptionError, match="is a run; choose a directory of its own"):
            compare(runs, runs[1], CONFIG)
        assert not (runs[1] / "compare").exists()

    @pytest.mark.parametrize(
        ("file", "what"), [("analysis/x", "a run"), ("store.json", "a store"), ("DONE.json", "a stage")]
    )
    def test_nothing_else_is_overwritten_with_it(self, runs, tmp_path, file, what):
        place = tmp_path / "third" / file
        place.parent.mkdir(parents=True)
        place.write_text("")
        with pytest.raises(OptionError, match=f"third: is {what}.*; choose a directory of its own"):
            compare(runs, tmp_path / "third", CONFIG)
        assert [path for path in (tmp_path / "third").rglob("*") if path.is_file()] == [place]


class TestSkipping:
    def test_a_second_run_is_skipped_and_a_forced_one_gives_the_same_bytes(self, tmp_path, monkeypatch):
        run = fake_run(tmp_path / "r", CHANGED)
        compare([run], run, CONFIG)
        files = {path.name: path.read_bytes() for path in (run / "compare").iterdir()}
        assert set(files) == {"categories.csv", "seeds.csv", "statistics.json", "verdict.json", "DONE.json"}
        with monkeypatch.context() as patch:
            patch.setattr("fastdiff.comparison.published.compare_shares", None)  # calling it fails
            compare([run], run, CONFIG)
            with pytest.raises(TypeError):
                compare([run], run, CompareConfig(alpha=0.1))
        # what was there still counts; without its mark it is made anew
        assert rundir.require_done(run / "compare", "")["config"]["alpha"] == CONFIG.alpha
        (run / "compare" / "DONE.json").unlink()
        compare([run], run, CONFIG)
        assert {path.name: path.read_bytes() for path in (run / "compare").iterdir()} == files

    def test_other_labels_are_compared_anew(self, tmp_path):
        run = fake_run(tmp_path / "r", CHANGED)
        compare([run], run, CONFIG)
        fake_run(run, SAME)
        compare([run], run, CONFIG)
        assert "no category differs" in rundir.read_json(run / "compare" / "statistics.json", 3)["verdict"][0]


class TestRefusals:
    def test_a_missing_stage_is_named_with_its_command(self, tmp_path):
        run = fake_run(tmp_path / "r", SAME)
        rundir.begin(run / "annotate")
        with pytest.raises(InputError, match=f"run `fastdiff annotate {run}` first"):
            compare([run], run, CONFIG)
        rundir.begin(run / "analysis")
        with pytest.raises(InputError, match=f"run `fastdiff analyze {run}` first"):
            compare([run], run, CONFIG)
        assert not (run / "compare").exists()

    def test_labels_of_another_analysis_are_refused(self, tmp_path):
        run = fake_run(tmp_path / "r", SAME)
        rundir.write_json(run / "analysis" / "summary.json", {"schema": 1, "models": []})
        rundir.finish(run / "analysis", "analyze", {}, {}, OUTPUTS)
        with pytest.raises(InputError, match=f"another analysis; run `fastdiff annotate {run}` again"):
            compare([run], run, CONFIG)

    def test_a_directory_that_another_writes_to_is_refused(self, tmp_path):
        run = fake_run(tmp_path / "r", SAME)
        with rundir.locked(run), pytest.raises(LockedError):
            compare([run], run, CONFIG)


def test_numbers_in_the_table_are_finite_or_absent(tmp_path):
    run = fake_run(tmp_path / "r", [*CHANGED, ("tuned", "new", 3), ("base", "old", 3)])
    compare([run], run, CONFIG)
    for row in table(run).values():
        values = [value for name, value in row.items() if name not in ("comparison", "category", "side_a", "side_b")]
        assert all(value == "" or math.isfinite(float(value)) for value in values)


def test_a_category_of_the_text_that_no_latent_stands_for_is_in_the_table(tmp_path):
    run = fake_run(tmp_path / "r", SAME)
    path = run / "analysis" / "summary.json"
    sources = [{"dataset": "d", "category": "poetry"}, {"dataset": "d", "category": None}]
    energy = {"energy_by_source": [[1.0, 1.0]] * len(sources), "tokens_by_source": [9] * len(sources)}
    n = len((run / "analysis" / "latents.csv").read_text().splitlines()) - 1
    fired = np.zeros((n, len(sources)), np.int64)
    save_file({"count_by_source": fired, "documents_by_source": fired}, run / "analysis" / "firing.safetensors")
    rundir.write_json(path, rundir.read_json(path, 1) | {"sources": sources} | energy)
    done = rundir.read_json(run / "analysis" / "DONE.json", 1)
    rundir.finish(run / "analysis", "analyze", {}, done["inputs"], OUTPUTS)
    outputs = rundir.require_done(run / "analysis", "")["outputs"]
    rundir.finish(run / "annotate", "annotate", {}, outputs, ["labels.jsonl"])
    compare([run], run, CONFIG)
    assert counts(table(run)["base→tuned", "poetry"]) == (0, 40, 0, 40)
    assert {category for _, category in table(run)} == {"code", "law", "math", "poetry"}


def test_runs_at_different_layers_or_of_unknown_models_are_not_triangulated(tmp_path):
    runs = [fake_run(tmp_path / name, SAME, weights="aa") for name in ("a", "b")]
    path = runs[1] / "analysis" / "summary.json"
    summary = rundir.read_json(path, 1)
    summary["models"][0]["layer"] = 2
    rundir.write_json(path, summary)
    rundir.finish(runs[1] / "analysis", "analyze", {}, {"store": "0"}, OUTPUTS)
    outputs = rundir.require_done(runs[1] / "analysis", "")["outputs"]
    rundir.finish(runs[1] / "annotate", "annotate", {}, outputs, ["labels.jsonl"])
    with pytest.raises(OptionError, match="layers or hooks"):
        compare(runs, tmp_path / "out", CONFIG)


LIKE = [("base", "code", 30), ("base", "law", 9), ("tuned", "code", 5), ("tuned", "law", 28), ("tuned", None, 3)]
UNLIKE = [("base", "code", 10), ("base", "law", 30), ("tuned", "code", 30), ("tuned", "law", 10)]


def test_a_run_is_no_null_of_itself(tmp_path):
    run = fake_run(tmp_path / "r", SAME)
    with pytest.raises(OptionError, match=r"--null .*: is compared itself; give a run whose models differ by nothing"):
        compare([run], run, CompareConfig(null_run=str(tmp_path / "." / "r")))


class TestSeveralSeeds:
    def rows(self, run, seeds):
        compare([fake_run(run, CHANGED, seeds=seeds)], run, CONFIG)
        return {category: row for (_, category), row in table(run).items()}

    def test_counts_are_added_up_and_signs_and_phi_stand_beside(self, tmp_path):
        run = tmp_path / "r"
        law = self.rows(run, {1: LIKE, 4: LIKE})["law"]
        assert counts(law) == (5, 66, 30, 49)  # of the analysed seed, as with one seed
        pooled = [int(law[f"pooled_{name}"]) for name in ("count_a", "total_a", "count_b", "total_b")]
        assert pooled == [5 + 2 * 9, 66 + 2 * 39, 30 + 2 * 28, 49 + 2 * 36] and law["signs"] == "+++"
        assert float(law["pooled_p"]) < float(law["pooled_q"]) < 0.001
        (found,) = rundir.read_json(run / "compare" / "statistics.json", 3)["comparisons"]
        assert found["seeds"] == [0, 1, 4] and found["phi_a"] > 1 and found["phi_b"] > 0
        with (run / "compare" / "seeds.csv").open(encoding="utf-8", newline="") as f:
            by_seed = {(row["seed"], row["category"]): row for row in csv.DictReader(f)}
        assert counts(by_seed["4", "law"]) == (9, 39, 28, 36)
        assert counts(by_seed["4", "unlabelled"]) == (0, 39, 3, 36)
        assert float(by_seed["4", "law"]["delta_points"]) == pytest.approx(100 * (28 / 36 - 9 / 39), rel=1e-5)

    def test_what_the_seeds_do_not_agree_on_is_not_significant(self, tmp_path):
        alone = self.rows(tmp_path / "alone", None)
        assert alone["law"]["significant"] == "1" and alone["law"]["signs"] == alone["law"]["pooled_q"] == ""
        mixed = self.rows(tmp_path / "mixed", {1: LIKE, 2: UNLIKE})
        assert (mixed["law"]["signs"], mixed["law"]["significant"]) == ("++-", "0")
        verdict = rundir.read_json(tmp_path / "mixed" / "compare" / "statistics.json", 3)["verdict"]
        assert not any("law (" in sentence for sentence in verdict)

    def test_small_differences_that_all_seeds_show_become_significant(self, tmp_path):
        slight = [(side, c, n) for side, a, b in (("base", 22, 18), ("tuned", 16, 24)) for c, n in (("x", a), ("y", b))]
        run = fake_run(tmp_path / "one", slight)
        compare([run], run, CONFIG)
        assert all(row["significant"] == "0" for row in table(run).values())
        run = fake_run(tmp_path / "five", slight, seeds=dict.fromkeys(range(1, 5), slight))
        compare([run], run, CONFIG)
        assert all(row["significant"] == "1" for row in table(run).values())
        gained, _ = rundir.read_json(run / "compare" / "statistics.json", 3)["verdict"]
        assert "y (24/40 against 18/40 latents; in 5 seeds 120/200 against 90/200, signs +++++, q = " in gained

    def test_of_two_runs_the_seeds_that_both_have_are_counted(self, tmp_path):
        runs = [
            fake_run(tmp_path / "it", CHANGED, seeds={1: LIKE, 2: LIKE}),
            fake_run(tmp_path / "po", SAME, tuned="models/po", seeds={2: UNLIKE, 3: UNLIKE}),
        ]
        compare(runs, tmp_path / "out", CONFIG)
        found = rundir.read_json(tmp_path / "out" / "compare" / "statistics.json", 3)["comparisons"]
        assert {c["name"]: c["seeds"] for c in found} == {
            "it": [0, 1, 2],
            "po": [0, 2, 3],
            "gained": [0, 2],
            "lost": [0, 2],
        }
        law = table(tmp_path / "out")["gained", "law"]
        assert [int(law[f"pooled_{name}"]) for name in ("count_a", "count_b")] == [30 + 28, 11 + 10]

    def test_labels_of_an_earlier_version_are_refused_with_the_commands(self, tmp_path):
        run = fake_run(tmp_path / "r", CHANGED)
        (run / "annotate" / "seeds.csv").unlink()
        rundir.finish(
            run / "annotate", "annotate", {}, rundir.require_done(run / "analysis", "")["outputs"], ["labels.jsonl"]
        )
        with pytest.raises(
            InputError, match=r"seeds.csv: no such file; run `fastdiff analyze .*` and `fastdiff annotate"
        ):
            compare([run], run, CONFIG)


def test_a_share_that_falls_while_the_count_rises_is_said_beside_it(tmp_path):
    latents = [("base", "code", 30), ("base", "law", 10), ("tuned", "code", 40), ("tuned", "law", 160)]
    run = fake_run(tmp_path / "r", latents)
    compare([run], run, CONFIG)
    more, less = rundir.read_json(run / "compare" / "statistics.json", 3)["verdict"]
    assert "code (40/200 against 30/40 latents, q = " in less and less.endswith(
        "; its share fell while the count rose)."
    )
    assert "the count" not in more


def test_a_comparison_of_an_earlier_version_is_made_anew(tmp_path):
    run = fake_run(tmp_path / "r", SAME)
    compare([run], run, CONFIG)
    path = run / "compare" / "statistics.json"
    wanted = path.read_bytes()
    # as a version wrote it that knew schema 1, with its own mark
    path.write_text(json.dumps(json.loads(wanted) | {"schema": 1}))
    done = rundir.read_json(run / "compare" / "DONE.json", 1)
    rundir.finish(run / "compare", "compare", done["config"], done["inputs"], list(done["outputs"]))
    compare([run], run, CONFIG)
    assert path.read_bytes() == wanted
