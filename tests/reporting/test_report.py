"""The report's files: what they hold, what they refuse, and that hostile text stays text."""

import base64
import csv
import gzip
import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from fastdiff import rundir
from fastdiff.errors import InputError, LockedError
from fastdiff.reporting.builder import build_report
from fastdiff.reporting.charts import forest_limit
from fastdiff.reporting.tables import scale
from fastdiff.reporting.text import csv_cell, fixed, number, probability, short_name, visible
from fastdiff.results.verdict import Verdict


class Page(HTMLParser):
    """Tags with their attributes and the text that follows each directly, in document order."""

    def __init__(self, path: Path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.content: list[str] = []
        self._inside = False
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.content.append("")
        self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.content[-1] += data

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(a, text) for (name, a), text in zip(self.tags, self.content, strict=True) if name == tag]

    def decoded(self, attribute: str, value: str) -> str:
        (text,) = [text for a, text in self.all("script") if a.get(attribute) == value]
        return gzip.decompress(base64.b64decode(text)).decode()

    def island(self) -> dict[str, Any]:
        return json.loads(self.decoded("id", "island"))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def run(make_pair: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_pair(tmp_path_factory.mktemp("pair") / "run")
    build_report(directory)
    return directory


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_the_island_holds_every_card_with_its_numbers_and_tokens(run: Path) -> None:
    island = Page(run / "report/report.html").island()
    table = read_csv(run / "analysis/latents.csv")
    labels = [json.loads(line) for line in (run / "annotate/labels.jsonl").read_text().splitlines()]
    by_latent = {label["latent"]: label for label in labels}
    connection = sqlite3.connect(run / "analysis/examples.sqlite")
    query = "SELECT sequence_id, position, dataset, category, activation, peak, tokens, activations FROM examples"
    rows = [dict(zip(island["fields"], row, strict=True)) for row in island["latents"]]
    assert [row["latent"] for row in rows] == list(range(60))
    for row in rows:
        latent, wanted = row["latent"], table[row["latent"]]
        assert row["run"] == 0
        assert (row["class"], row["specific"]) == (wanted["class"], wanted["specific"])
        label = by_latent.get(latent, {"label": "", "category": "", "confidence": None})
        assert island["names"][row["category"]] == label["category"]
        assert row["label"] == visible(label["label"])
        assert row["confidence"] == label["confidence"]
        for name in ("delta_norm", "cosine", "nu_error"):
            assert row[name] == pytest.approx(float(wanted[name]), rel=1e-3)
        assert row["count"] == int(wanted["count"])
        assert [island["vocabulary"][t] for t in row["top_tokens"]] == [
            visible(t) for t in json.loads(wanted["top_tokens"])
        ]
        stored = connection.execute(f"{query} WHERE latent = ? ORDER BY rank", (latent,)).fetchall()
        assert len(row["examples"]) == len(stored) == 5
        assert row["stability"] == 0.5
        planted = {(i + 12 * k, i): (0.05 - 0.01 * k) * (-1 if i % 3 == 1 else 1) for i in range(6) for k in range(5)}
        assert row["nats"] == pytest.approx([planted.get((latent, i), 1e-5) for i in range(6)], rel=1e-3)
        for shown, (document, position, dataset, category, activation, peak, tokens, values) in zip(
            row["examples"], stored, strict=True
        ):
            assert shown[:2] == [document, position]
            assert [island["names"][i] for i in shown[2:4]] == [dataset, category]
            assert shown[4] == pytest.approx(activation, rel=1e-3)
            assert shown[5] == peak
            assert [island["vocabulary"][t] for t in shown[6]] == [visible(t) for t in json.loads(tokens)]
            dense = [0.0] * len(shown[6])
            for i, value in zip(shown[7][::2], shown[7][1::2], strict=True):
                dense[i] = value
            assert dense == pytest.approx(json.loads(values), rel=1e-2)
    connection.close()


def test_latents_csv_is_the_analysis_with_labels_filled_in(run: Path) -> None:
    analysis, joined = read_csv(run / "analysis/latents.csv"), read_csv(run / "report/latents.csv")
    labels = [json.loads(line) for line in (run / "annotate/labels.jsonl").read_text().splitlines()]
    by_latent = {label["latent"]: label for label in labels}
    assert len(analysis) == len(joined) == 400
    assert list(joined[0]) == [
        *(name for name in analysis[0] if name != "top_tokens"),
        "confidence",
        "annotator",
        "top_tokens",
    ]
    for before, after in zip(analysis, joined, strict=True):
        label = by_latent.get(int(before["latent"]))
        filled = {"label": "", "category": ""} if label is None else label
        written = {"label", "category", "top_tokens"}
        assert {k: after[k] for k in before if k not in written} == {k: before[k] for k in before if k not in written}
        assert after["top_tokens"] == visible(" ".join(json.loads(before["top_tokens"])))
        assert after["label"] == visible(filled["label"])
        assert after["category"] == filled["category"]
        assert after["confidence"] == ("0.93" if label else "")


def test_categories_csv_equals_the_comparison(run: Path) -> None:
    compared = read_csv(run / "compare/categories.csv")
    # signs would be taken for a formula
    assert read_csv(run / "report/categories.csv") == [{**row, "signs": f"'{row['signs']}"} for row in compared]


def test_embedded_downloads_equal_the_files_beside_the_page(run: Path) -> None:
    page = Page(run / "report/report.html")
    for name in ("latents.csv", "categories.csv", "report.json"):
        assert page.decoded("data-name", name) == (run / "report" / name).read_text(encoding="utf-8")


def test_report_json_holds_the_numbers(run: Path) -> None:
    report = json.loads((run / "report/report.json").read_text())
    summary = json.loads((run / "analysis/summary.json").read_text())
    assert report["title"] == "base → it"
    assert report["verdict"]["comparisons"][0]["sentences"] == ["Tuning added self-reference."]
    assert report["specific_latents"] == ["Tuning added self-reference."]
    (first,) = report["runs"]
    for name in ("n_tokens", "dict_size", "classes", "specific", "never_fired"):
        assert first[name] == summary[name]
    gained = {row["category"]: row["delta_points"] for row in report["categories"]}
    assert gained["self-reference"] == 17
    assert gained["code"] == -10.5


def test_what_cannot_be_trusted_is_said(run: Path, make_pair: Callable[..., Path], tmp_path: Path) -> None:
    html = Page(run / "report/report.html").html
    trust = html[html.index('id="trust"') : html.index('id="changed"')]
    assert "explains 0.87 and 0.78 of the models&#39; variance" in trust and "▲ poor" in trust
    assert "○ not checked" in trust and "--splice" in trust and "--null" in trust
    (trusted,) = json.loads((run / "report/report.json").read_text())["trust"]
    checks = {check["name"]: check["state"] for check in trusted["checks"]}
    assert trusted["state"] == checks["reconstruction"] == "poor"
    assert checks["splice"] == checks["sinks"] == checks["null"] == "not checked"
    assert "45 of 60</dd>" in html and "200 of 390</dd>" in html and "latents are specific to" not in html
    few = build_report(make_pair(tmp_path / "run", sizes=(100, 20, 2, 9))).read_text()
    assert "Only 10 latents are specific to tuned" in few


def test_latents_that_do_not_come_back_are_said(
    make_pair: Callable[..., Path], settle: Callable[[Path, str], None], tmp_path: Path
) -> None:
    run = make_pair(tmp_path / "run")
    path = run / "analysis/summary.json"
    path.write_text(path.read_text().replace('"exclusive_stable": 45', '"exclusive_stable": 6'))
    settle(run, "analysis")
    assert "Only 10.0 % of the latents of one model come back with other seeds." in build_report(run).read_text()


def test_an_analysis_without_other_seeds_says_nothing_of_them(
    make_pair: Callable[..., Path], settle: Callable[[Path, str], None], tmp_path: Path
) -> None:
    run = make_pair(tmp_path / "run")
    summary, table = run / "analysis/summary.json", run / "analysis/latents.csv"
    facts = json.loads(summary.read_text())
    summary.write_text(json.dumps(facts | {"stability": None}))
    rows = read_csv(table)
    with table.open("w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {"stability": ""} for row in rows)
    settle(run, "analysis")
    page = Page(build_report(run))
    assert "other seeds" not in page.html.replace("in other seeds", "")  # the script has those words
    column = page.island()["fields"].index("stability")
    assert {row[column] for row in page.island()["latents"]} == {None}


def test_the_first_table_has_every_row_of_the_verdict(make_pair: Callable[..., Path], tmp_path: Path) -> None:
    run = make_pair(tmp_path / "run")
    html = build_report(run).read_text()
    first = html[html.index('id="verdict"') : html.index('id="trust"')]
    for row in json.loads((run / "compare" / "verdict.json").read_text())["comparisons"][0]["rows"]:
        words = {"gained": "▲ gained, ", "lost": "▼ lost, ", "none": ""}[row["change"]] + row["verdict"]
        words += f": {row['reason']}" if row["reason"] else ""
        link = f'<a href="#row={quote(row["category"])}">{row["category"]}</a>'
        assert link in first and f"<td>{words}</td>" in first
    # those of row_nats, with their labels and their nats in the row's direction
    labels = [json.loads(line) for line in (run / "annotate/labels.jsonl").read_text().splitlines()]
    words = {label["latent"]: label["label"] for label in labels}
    for i in range(6):
        sign = "−" if i % 3 == 1 else "+"
        for k in range(5):
            latent = i + 12 * k
            title = escape(visible(words.get(latent, "")), quote=False).replace('"', "&#34;").replace("'", "&#39;")
            wanted = f'<a href="#latent={latent}" title="{sign}0.0{5 - k}0 nats; {title}">{latent}</a>'
            assert wanted in first
    assert "The latents are those of crosscoder seed 0, which was analysed." in first


def test_every_word_of_a_verdict_is_explained_and_how_much_the_latents_hold_is_said(run: Path) -> None:
    html = (run / "report/report.html").read_text()
    words = html[html.index("What the words mean") : html.index('id="trust"')]
    for word in ("confirmed", "suggestive", "no change", "by a mean shift"):
        assert f"<dt>{word}</dt>" in words
    assert "neither has it" not in words and "changed by 0.05 nats or more" in words
    assert "bfloat16, whose rounding alone makes 0.02 to 0.03 % of the variance" in html
    assert "Of the confirmed changes 100 % comes about up to this layer" in html and "no text was generated" in html


def test_what_neither_model_has_does_not_squeeze_the_other_rows() -> None:
    tested = {"mean": -13.0, "low": -14.0, "high": -12.0, "p": 0.0, "q": 0.0}
    small = {name: value / 10 for name, value in tested.items()}
    rows = [
        Verdict.model_validate(
            {"category": "n", "change": "none", "verdict": "neither has it", "B": tested, "V": tested}
        ),
        Verdict.model_validate({"category": "a", "change": "lost", "verdict": "confirmed", "B": small, "V": small}),
    ]
    assert scale(rows) == 2 and scale(rows[:1]) == 20


def test_report_json_has_the_latents_of_each_row_with_their_measures(run: Path) -> None:
    report = json.loads((run / "report/report.json").read_text())
    table = read_csv(run / "analysis/latents.csv")
    rows = {row["category"]: row for row in report["row_latents"]}
    assert list(rows) == ["code", "factual", "instruction following", "multilingual", "refusal", "self-reference"]
    for i, (category, row) in enumerate(rows.items()):
        assert (row["run"], row["seed"], row["change"]) == ("it", 0, ("gained", "lost", "none")[i % 3])
        assert [one["latent"] for one in row["latents"]] == [i + 12 * k for k in range(5)]
        for k, one in enumerate(row["latents"]):
            assert one["nats"][category] == pytest.approx((0.05 - 0.01 * k) * (-1 if i % 3 == 1 else 1))
            assert len(one["nats"]) == 6 and one["contexts"] == 5
            for name in ("delta_norm", "nu_error", "nu_reconstruction", "nu_activation", "cosine"):
                assert one[name] == pytest.approx(float(table[one["latent"]][name]))


def test_latents_of_a_row_without_contexts_are_named_with_what_to_do(
    make_pair: Callable[..., Path], settle: Callable[[Path, str], None], tmp_path: Path
) -> None:
    run = make_pair(tmp_path / "run")
    connection = sqlite3.connect(run / "analysis/examples.sqlite")
    for table in ("latents", "examples"):
        connection.execute(f"DELETE FROM {table} WHERE latent = 12")
    connection.commit()
    connection.close()
    settle(run, "analysis")
    html = build_report(run).read_text()
    assert 'href="#latent=12"' not in html and 'href="#latent=24"' in html
    assert f"Some have no contexts, since the nats are newer: run fastdiff analyze {run} again." in html


def test_a_run_that_was_not_attributed_has_rows_without_latents(
    make_pair: Callable[..., Path], settle: Callable[[Path, str], None], tmp_path: Path
) -> None:
    run = make_pair(tmp_path / "run")
    shutil.rmtree(run / "attribution")
    settle(run, "compare")
    page = Page(build_report(run))
    assert "#row=" not in page.html.replace("`#row=", "")
    column = page.island()["fields"].index("nats")
    assert {tuple(row[column]) for row in page.island()["latents"]} == {()}
    assert json.loads((run / "report/report.json").read_text())["row_latents"] == []


def test_a_run_that_was_not_checked_says_what_would_check_it(
    make_pair: Callable[..., Path], settle: Callable[[Path, str], None], tmp_path: Path
) -> None:
    run = make_pair(tmp_path / "run")
    path = run / "compare" / "verdict.json"
    verdict = json.loads(path.read_text())
    verdict["comparisons"][0] |= {"state": "not checked", "reason": "models are gone", "remedy": "fastdiff attribute r"}
    path.write_text(json.dumps(verdict))
    settle(run, "compare")
    html = build_report(run).read_text()
    assert "Not checked: models are gone." in html and "<code>fastdiff attribute r</code>" in html


def test_a_comparison_of_an_older_version_is_named(make_pair: Callable[..., Path], tmp_path: Path) -> None:
    run = make_pair(tmp_path / "run")
    done = run / "compare" / "DONE.json"
    facts = json.loads(done.read_text())
    del facts["outputs"]["verdict.json"]
    done.write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"has no verdict\.json; run the same `fastdiff compare` again"):
        build_report(run)


def test_a_comparison_shows_both_runs_and_the_planted_truth(
    make_triangulated: Callable[..., Path], tmp_path: Path
) -> None:
    directory = make_triangulated(tmp_path)
    page = Page(build_report(directory))
    assert page.all("title")[0][1] == "What changed: base → it, simpo"
    island = page.island()
    assert island["runs"] == ["it", "simpo"]
    assert [row[0] for row in island["latents"]] == [0] * 60 + [1] * 60
    rows = read_csv(directory / "report/latents.csv")
    assert next(iter(rows[0])) == "run"
    assert [row["run"] for row in rows] == ["it"] * 400 + ["simpo"] * 400
    simpo = read_csv(tmp_path / "simpo/analysis/latents.csv")
    assert [row["delta_norm"] for row in rows[400:]] == [row["delta_norm"] for row in simpo]
    assert "2 of 4 planted changes recovered." in page.html
    assert page.html.count("✓ yes") == page.html.count("✗ no") == 2
    buttons = [a for a, _ in page.all("button") if "data-category" in a]
    runs = [a.get("data-run") for a in buttons]
    # the table of specific latents has a comparison of each run and two between them
    assert runs == ["0"] * 6 + ["1"] * 6 + [None] * 12
    # the verdict has one of each run, and one between them whose rows open the latents of both
    rows = [a["href"] for a, _ in page.all("a") if (a.get("href") or "").startswith("#row=code")]
    assert rows == ["#row=code&run=it", "#row=code&run=simpo", "#row=code"]
    difference = page.html[page.html.index('aria-label="Verdict, simpo against it"') :]
    difference = difference[: difference.index("</tr>", difference.index("#row=code"))]
    assert re.findall(r"#latent=(\d+)&amp;run=(\w+)", difference) == [
        (str(12 * k), name) for name in ("it", "simpo") for k in range(5)
    ]


def test_a_pair_has_no_planted_truth(run: Path) -> None:
    assert "Planted" not in Page(run / "report/report.html").html


def test_hostile_text_stays_text(hostile_run: Path, hostile: tuple[str, ...]) -> None:
    page = Page(build_report(hostile_run))
    for text in hostile:
        if "<" in text or not text.isprintable():
            assert text not in page.html
    executable = [a for a, _ in page.all("script") if a.get("type") != "text/plain"]
    assert len(executable) == len(page.all("style")) == 1
    allowed = {"Content-Security-Policy", None}
    assert {a.get("http-equiv") for a, _ in page.all("meta")} == allowed
    assert not {"img", "iframe", "link", "base", "object", "embed"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert re.fullmatch(r"#([a-z]+|latent=\d+(&run=[\w%.-]+)?|row=[\w%.~-]+)", attributes.get("href") or "#main")
    unseen = {c for c in page.html if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c != "\n"}
    assert unseen == set()
    assert "{{7*7}}" in page.html
    shown = page.island()
    assert {visible(text) for text in hostile} <= set(shown["vocabulary"])
    assert {visible(text) for text in hostile} <= {row[6] for row in shown["latents"]}
    assert "__proto__" in shown["names"]


def test_spreadsheets_get_no_formulas(hostile_run: Path, hostile: tuple[str, ...]) -> None:
    build_report(hostile_run)
    labels = [json.loads(line) for line in (hostile_run / "annotate/labels.jsonl").read_text().splitlines()]
    by_latent = {label["latent"]: label for label in labels}
    seen = set()
    for row in read_csv(hostile_run / "report/latents.csv"):
        for name in ("label", "category", "annotator", "top_tokens"):
            assert not row[name].startswith(("=", "+", "-", "@", "\t", "\r"))
        if label := by_latent.get(int(row["latent"])):
            assert row["label"] in (visible(label["label"]), "'" + visible(label["label"]))
            seen.add(label["label"])
        assert row["beta_error_base"] == "-0.5"
    assert seen == set(hostile)
    for row in read_csv(hostile_run / "report/categories.csv"):
        assert not row["category"].startswith(("=", "+", "-", "@", "\t", "\r"))


def test_the_policy_allows_the_page_s_own_script_and_style_only(run: Path) -> None:
    page = Page(run / "report/report.html")
    (policy,) = [a["content"] for a, _ in page.all("meta") if "http-equiv" in a]
    own = {
        "script-src": next(text for a, text in page.all("script") if "type" not in a),
        "style-src": page.all("style")[0][1],
    }
    for directive, text in own.items():
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "base-uri 'none'; form-action 'none'" in policy
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", page.html)


def test_a_second_build_gives_the_same_bytes(copy: Path) -> None:
    before = {path.name: path.read_bytes() for path in (copy / "report").iterdir()}
    shutil.rmtree(copy / "report")
    script = "import sys; from pathlib import Path; from fastdiff.reporting.builder import build_report as b;"
    subprocess.run(
        [sys.executable, "-P", "-c", f"{script} b(Path(sys.argv[1]))", str(copy)],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo"},
    )
    assert {path.name: path.read_bytes() for path in (copy / "report").iterdir()} == before


def test_an_unchanged_run_is_left_alone(copy: Path) -> None:
    page = copy / "report/report.html"
    before = page.stat().st_mtime_ns, page.stat().st_ino
    # times of day and the report's own entry are no part of what the page shows
    events = (copy / "events.jsonl").read_text()
    (copy / "events.jsonl").write_text(re.sub(r'"time": [\d.]+', '"time": 1', events))
    rundir.record(copy, "report", {"anything": 1})
    build_report(copy)
    assert (page.stat().st_mtime_ns, page.stat().st_ino) == before


@pytest.mark.parametrize("change", ["label", "page", "log", "unfinished"])
def test_a_changed_run_is_rebuilt(copy: Path, change: str, settle: Callable[[Path, str], None]) -> None:
    page = copy / "report/report.html"
    before = page.read_text()
    if change == "label":
        path = copy / "annotate/labels.jsonl"
        path.write_text(path.read_text().replace('"label": "', '"label": "fresh ', 1))
        settle(copy, "annotate")
    elif change == "page":
        page.write_text(before + "x")
    elif change == "log":
        with (copy / "events.jsonl").open("a") as f:
            f.write(json.dumps({"stage": "train", "step": 2050, "loss": 3.0}) + "\n")
    else:
        (copy / "report/DONE.json").unlink()
        page.write_text("half a pa")
    build_report(copy)
    assert (page.read_text() == before) == (change in ("page", "unfinished"))
    assert page.read_text().endswith("</html>\n")


@pytest.mark.parametrize(
    ("stage", "command"), [("analysis", "analyze"), ("annotate", "annotate"), ("compare", "compare")]
)
def test_a_missing_stage_is_named_with_its_command(copy: Path, stage: str, command: str) -> None:
    (copy / stage / "DONE.json").unlink()
    with pytest.raises(InputError, match=re.escape(f"run `fastdiff {command} {copy}` first")):
        build_report(copy)


def test_a_fresh_run_is_told_its_first_missing_stage(tmp_path: Path) -> None:
    (tmp_path / "crosscoder").mkdir()
    with pytest.raises(InputError, match=re.escape(f"run `fastdiff analyze {tmp_path}` first")):
        build_report(tmp_path)


def test_a_compared_run_without_labels_is_named(make_triangulated: Callable[..., Path], tmp_path: Path) -> None:
    directory = make_triangulated(tmp_path)
    (tmp_path / "simpo/annotate/DONE.json").unlink()
    with pytest.raises(InputError, match=r"simpo/annotate: .*`fastdiff annotate .*simpo`"):
        build_report(directory)


@pytest.mark.parametrize(
    ("name", "old", "new", "found"),
    [
        ("analysis/summary.json", '"dict_size": 400', '"dict_size": "many"', "dict_size"),
        ("analysis/summary.json", '"schema": 1', '"schema": 9', "schema 9"),
        ("analysis/latents.csv", "delta_norm", "delta", "'delta_norm'"),
        ("analysis/latents.csv", "\r\n1,", "\r\n1,x,", "line 3"),
        ("annotate/labels.jsonl", '"latent": 0', '"latent": null', "line 1"),
        ("annotate/labels.jsonl", "{", "", "JSON lines"),
        ("compare/categories.csv", "-10.5", "minus", "line 2, column delta_points"),
        ("compare/statistics.json", '"pair"', '"triple"', "kind"),
    ],
)
def test_a_file_that_does_not_fit_is_named(
    copy: Path, name: str, old: str, new: str, found: str, settle: Callable[[Path, str], None]
) -> None:
    path = copy / name
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode())
    settle(copy, path.parent.name)
    with pytest.raises(InputError) as caught:
        build_report(copy)
    message = str(caught.value)
    assert str(path) in message
    assert found in message
    assert "\n" not in message


@pytest.mark.parametrize(("stage", "command"), [("analysis", "annotate"), ("annotate", "compare")])
def test_stages_of_two_generations_are_refused(copy: Path, stage: str, command: str) -> None:
    path = copy / stage / {"analysis": "summary.json", "annotate": "labels.jsonl"}[stage]
    path.write_text(path.read_text() + "\n")
    done = json.loads((copy / stage / "DONE.json").read_text())
    rundir.finish(copy / stage, done["stage"], done["config"], done["inputs"], list(done["outputs"]))
    with pytest.raises(InputError, match=f"run .*`fastdiff {command}"):
        build_report(copy)


def test_a_file_changed_after_its_stage_is_refused(copy: Path) -> None:
    (copy / "annotate/labels.jsonl").write_text("")
    with pytest.raises(InputError, match="changed since it was written"):
        build_report(copy)


def test_examples_that_do_not_fit_are_refused(copy: Path, settle: Callable[[Path, str], None]) -> None:
    connection = sqlite3.connect(copy / "analysis/examples.sqlite")
    connection.execute("UPDATE examples SET activations = '[1.0]' WHERE latent = 7 AND rank = 2")
    connection.commit()
    connection.close()
    settle(copy, "analysis")
    with pytest.raises(InputError, match="an example of latent 7 does not fit"):
        build_report(copy)


def test_a_run_that_is_being_written_is_left_alone(copy: Path) -> None:
    with rundir.locked(copy), pytest.raises(LockedError):
        build_report(copy)


def test_a_run_without_logs_or_manifest_has_a_report(copy: Path) -> None:
    for name in ("events.jsonl", "manifest.json", "fastdiff.yaml"):
        (copy / name).unlink()
    assert "No training log" in build_report(copy).read_text()


def test_no_torch_is_imported() -> None:
    code = "import fastdiff.reporting.builder, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, héllo שלום 日本", "plain, héllo שלום 日本"),
        ("a\nb\tc", "a↵b⇥c"),
        ("\x00\x1b[2J\x7f", "␀␛[2J␡"),
        ("\x85", "⟪U+0085⟫"),
        ("\u202ex\u2066", "⟪U+202E⟫x⟪U+2066⟫"),
        ("\u200b\ufeff\u2028", "⟪U+200B⟫⟪U+FEFF⟫⟪U+2028⟫"),
        ("\ud800", "⟪U+D800⟫"),
        ("y" * 300, "y" * 200 + "… (300 characters)"),
    ],
)
def test_what_cannot_be_seen_is_shown(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert csv_cell(text) == shown


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@a", "\t=1", "\r=1"])
def test_a_formula_gets_an_apostrophe(text: str) -> None:
    assert csv_cell(text) == "'" + visible(text)


def test_numbers_are_written_for_readers() -> None:
    assert [number(x) for x in (None, float("nan"), 1234567, -0.012345, 0.5, 98765.4)] == [
        *("–", "–", "1,234,567", "−0.0123", "0.5", "98,765")
    ]
    assert [fixed(x, 1, True) for x in (None, 1.25, -3.0, 0.01, -0.01)] == ["–", "+1.2", "−3.0", "0.0", "0.0"]
    assert [probability(x) for x in (None, 0.0, 0.0009, 0.25)] == ["–", "< 0.001", "< 0.001", "0.250"]


def test_a_model_is_named_by_its_last_part_where_that_is_its_own() -> None:
    assert short_name("org/base", ["org/base", "org/it"]) == "base"
    assert short_name("a/model", ["a/model", "b/model"]) == "a/model"


def test_the_forest_scale_holds_every_interval() -> None:
    assert forest_limit([(1.0, -3.0, 4.2), (None, None, None)]) == 5
    assert forest_limit([]) == 1
    assert forest_limit([(99.0, None, None)]) == 100
