"""The command line: precedence, exit codes, one line per failure, results on stdout."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from fastdiff import rundir
from fastdiff.cli import cli, main
from fastdiff.cli_options import resolve
from fastdiff.config import CompareConfig, RunConfig, TrainConfig
from fastdiff.errors import OptionError
from fastdiff.results.trust import Check

FASTDIFF = Path(sys.executable).parent / "fastdiff"
STAGES = ["extract", "train", "attribute", "analyze", "annotate", "compare"]
COMMANDS = [*STAGES, "demo", "report", "run", "benchmark", "config init", "config schema"]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No option from the environment, and the signal handler as it was."""
    for name in os.environ:
        if name.startswith("FASTDIFF_"):
            monkeypatch.delenv(name)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def fastdiff(capsys):
    """Run a command in this process; exit code, stdout, stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Replace training; what it was called with is the last entry."""
    calls = []

    def train(store, out, config, progress, **options):
        calls.append((config, options))
        rundir.write_json(out / "crosscoder" / "config.json", {"schema": 1, "left_out": {"rows": 3}})
        return [out / "crosscoder"]

    monkeypatch.setattr("fastdiff.crosscoder.train.train_seeds", train)
    (tmp_path / "acts").mkdir()
    return calls


class TestHelp:
    def test_it_appears_in_300_ms(self):
        times = []
        for _ in range(5):
            started = time.perf_counter()
            done = subprocess.run([FASTDIFF, "--help"], capture_output=True, text=True, timeout=60)
            times.append(time.perf_counter() - started)
            assert done.returncode == 0 and "fastdiff demo" in done.stdout
        assert min(times) < 0.3, times

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_has_an_example_and_every_option_an_explanation(self, command, fastdiff):
        code, out, err = fastdiff(*command.split(), "--help")
        assert (code, err) == (0, "")
        assert f"  fastdiff {command} " in out or f"  fastdiff {command}\n" in out
        found = cli
        for name in command.split():
            found = found.commands[name]
        for parameter in found.get_params(click.Context(found, info_name=command)):
            assert isinstance(parameter, click.Argument) or parameter.help, parameter.name

    @pytest.mark.parametrize("command", STAGES)
    def test_every_field_of_a_stage_is_an_option(self, command, fastdiff):
        _, out, _ = fastdiff(command, "--help")
        model = RunConfig.model_fields[command].annotation
        for name, field in model.model_fields.items():
            if (command, name) == ("attribute", "enabled"):
                # it says whether `run` takes the stage, and has an option there
                assert "--enabled" not in out and "--no-attribute" in fastdiff("run", "--help")[1]
                continue
            flag = (field.json_schema_extra or {}).get("flag", f"--{name.replace('_', '-')}")
            assert f"{flag} " in out or f"{flag} /" in out, name
            if not field.is_required() and isinstance(field.default, int | str):
                assert f"[default: {field.default}]" in " ".join(out.split()), name

    def test_without_a_command_it_shows_help_and_fails(self, fastdiff):
        code, out, err = fastdiff()
        assert code == 2 and "fastdiff demo" in out + err

    def test_version(self, fastdiff):
        import fastdiff as package

        code, out, _ = fastdiff("--version")
        assert code == 0 and package.__version__ in out


class TestPrecedence:
    def k(self, calls, tmp_path, *arguments, env=None):
        command = ["train", str(tmp_path / "acts"), "-o", str(tmp_path / "run"), *map(str, arguments)]
        result = CliRunner().invoke(cli, command, env=env, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return calls[-1][0].k

    def test_option_over_environment_over_file_over_default(self, trained, tmp_path):
        file = tmp_path / "c.yaml"
        file.write_text("train: {k: 5, steps: 77}\nanalyze: {cards: 3}\n")
        env = {"FASTDIFF_TRAIN_K": "6"}
        assert self.k(trained, tmp_path) == TrainConfig().k
        assert self.k(trained, tmp_path, "-c", file) == 5
        assert self.k(trained, tmp_path, "-c", file, env=env) == 6
        assert self.k(trained, tmp_path, "-c", file, "--k", 7, env=env) == 7
        assert trained[-1][0].steps == 77

    def test_set_works_like_an_option(self, trained, tmp_path):
        assert self.k(trained, tmp_path, "--set", "k=8", env={"FASTDIFF_TRAIN_K": "6"}) == 8
        assert self.k(trained, tmp_path, "--set", "dict-size=128", "--set", "k=9") == 9
        assert trained[-1][0].dict_size == 128

    def test_zero_and_false_are_values(self, trained, tmp_path, monkeypatch):
        file = tmp_path / "c.yaml"
        file.write_text("train: {clip: 0.5, seed: 3}\n")
        self.k(trained, tmp_path, "-c", file, "--clip", 0, "--seed", 0)
        assert (trained[-1][0].clip, trained[-1][0].seed) == (0, 0)
        harvested = []
        monkeypatch.setattr(
            "fastdiff.extraction.harvest.extract", lambda config, out, *_, **__: harvested.append(config)
        )
        file.write_text("extract: {base: a, tuned: b, dataset: [x y.jsonl], layer: 3, keep_bos: true}\n")
        for options, keep, datasets in (
            ([], True, ["x y.jsonl"]),
            (["--no-keep-bos", "--dataset", "p q.jsonl", "--dataset", "r"], False, ["p q.jsonl", "r"]),
        ):
            command = ["extract", "-c", str(file), "-o", str(tmp_path / "s"), *options]
            assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
            assert (harvested[-1].keep_bos, harvested[-1].dataset, harvested[-1].layer) == (
                keep,
                datasets,
                "3",
            )

    def test_switches_reach_the_stage(self, trained, tmp_path):
        self.k(trained, tmp_path)
        assert trained[-1][1] == {"resume": True, "overwrite": False}
        self.k(trained, tmp_path, "--no-resume", "--overwrite")
        assert trained[-1][1] == {"resume": False, "overwrite": True}

    @pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n", "train: {}\nextract:\n"])
    def test_an_empty_file_or_section_is_the_default(self, trained, tmp_path, text):
        file = tmp_path / "c.yaml"
        file.write_text(text)
        assert self.k(trained, tmp_path, "-c", file) == TrainConfig().k

    def test_run_takes_all_sections_from_one_file(self, monkeypatch, tmp_path, fastdiff):
        seen = []
        pair = {"name": "base→tuned", "kind": "pair", "runs": ["r"], "base": "a", "tuned": "b", "state": "checked"}
        comparisons = [{**pair, "sentences": ["a sentence"]}]
        verdict = {"schema": 1, "tau": 0.05, "alpha": 0.05, "confidence": 0.95, "comparisons": comparisons}

        runs = [{"name": "r", "path": ".", "base": "a", "tuned": "b"}]
        statistics = {"schema": 3, "kind": "pair", "alpha": 0.05, "confidence": 0.95, "runs": runs, "comparisons": []}
        statistics |= {"verdict": [], "method": ""}

        def pipeline(config, out, progress, **options):
            seen.append(config)
            rundir.write_json(out / "compare" / "verdict.json", verdict)
            rundir.write_json(out / "compare" / "statistics.json", statistics)
            return out / "report.html"

        monkeypatch.setattr("fastdiff.pipeline.run_pipeline", pipeline)
        file = tmp_path / "c.yaml"
        # compare has only comments, as in a template whose lines are all commented out
        file.write_text("extract: {base: a, tuned: b, dataset: [x]}\ntrain: {k: 5}\ncompare:\n  # alpha: 0.1\n")
        code, out, err = fastdiff("run", "-c", file, "-o", tmp_path / "r", "--set", "train.dict-size=64")
        assert (code, out) == (0, f"base→tuned: a sentence\nreport: {tmp_path / 'r' / 'report.html'}\n")
        assert err.startswith("trust in base→tuned: Of 7 checks, ") and len(err.splitlines()) == 8
        assert (seen[-1].train.k, seen[-1].train.dict_size, seen[-1].compare) == (5, 64, CompareConfig())


def test_the_environment_reaches_the_stages_of_run_too(tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text("extract: {base: a, tuned: b, dataset: [x]}\ntrain: {k: 8}\n")
    monkeypatch.setenv("FASTDIFF_TRAIN_K", "6")
    monkeypatch.setenv("FASTDIFF_TRAIN_SEEDS", "3,4")
    monkeypatch.setenv("FASTDIFF_EXTRACT_DATASET", "one.txt two.txt")
    monkeypatch.setenv("FASTDIFF_ANALYZE_SPLICE", "true")
    found = resolve(RunConfig, None, file, (), {})
    assert (found.train.k, found.train.seeds, found.analyze.splice) == (6, (3, 4), True)
    assert found.extract.dataset == ["one.txt", "two.txt"]
    assert resolve(RunConfig, None, file, ("train.k=9",), {}).train.k == 9
    monkeypatch.setenv("FASTDIFF_TRAIN_K", "many")
    with pytest.raises(OptionError, match=r"^FASTDIFF_TRAIN_K: must be a whole number"):
        resolve(RunConfig, None, file, (), {})


class TestRefusals:
    """Exit code, and one line on stderr that says what is wrong."""

    def refuse(self, result, code, *says):
        found, out, err = result
        assert (found, out) == (code, ""), err
        assert err.startswith("Error: ") and err.count("\n") == 1 and "Traceback" not in err
        for part in says:
            assert part in err

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--k", 65, "--dict-size", 64], ["k must lie in [1, dict_size=64], got 65"]),
            (["--k", 0], ["--k", "got 0"]),
            (["--k", "many"], ["--k", "many"]),
            (["--activation", "gelu"], ["--activation", "gelu"]),
            (["--no-such-option", 1], ["--no-such-option", "fastdiff train --help"]),
            (["--set", "nope=1"], ["--set nope: no such option"]),
            (["--set", "train.k=1"], ["--set train"]),
            (["--set", "k"], ["--set k", "KEY=VALUE"]),
            (["--set", "k=[1"], ["--set k=[1", "not YAML"]),
            (["--set", "k.x=1", "--k", 3], ["'k' is a value"]),
            (["-c", "missing.yaml"], ["missing.yaml"]),
        ],
    )
    def test_options_that_cannot_work(self, fastdiff, trained, tmp_path, arguments, says):
        result = fastdiff("train", tmp_path / "acts", "-o", tmp_path / "run", *arguments)
        self.refuse(result, 2, *says)
        assert trained == [] and not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("train: {no_such_key: 1}", "c.yaml: train.no_such_key: no such field"),
            ("train: {stpes: 5}", "c.yaml: train.stpes: no such field; did you mean steps?"),
            ("train: {steps: many}", "c.yaml: train.steps: must be a whole number (got 'many')"),
            ("training: {k: 1}", "unknown section 'training'"),
            ("1: 2\nx: 3", "unknown section 1"),
            ("train: 5", "section train holds 5"),
            ("train: [k, 5]", "section train"),
            ("extract: 0", "section extract"),
            ("- train", "found list"),
            ("train: {k: [1", "not YAML"),
            ("\x00", "not YAML"),
        ],
    )
    def test_files_that_cannot_work(self, fastdiff, trained, tmp_path, text, says):
        file = tmp_path / "c.yaml"
        file.write_text(text)
        self.refuse(fastdiff("train", tmp_path / "acts", "-o", tmp_path / "run", "-c", file), 2, says)
        assert trained == []

    @pytest.mark.parametrize("command", ["attribute", "analyze", "annotate", "compare", "report"])
    def test_a_store_where_a_run_is_wanted(self, fastdiff, tmp_path, command):
        rundir.write_json(tmp_path / "acts" / "store.json", {})
        said = f"{tmp_path / 'acts'}: is a store and no run; `fastdiff train {tmp_path / 'acts'} -o RUN` makes one"
        self.refuse(fastdiff(command, tmp_path / "acts"), 3, said)

    def test_a_missing_path_or_argument(self, fastdiff, tmp_path):
        self.refuse(fastdiff("train", tmp_path / "nowhere", "-o", tmp_path / "run"), 3, "nowhere: no such file")
        self.refuse(fastdiff("train"), 2, "STORE")
        self.refuse(fastdiff("annotate", tmp_path / "nowhere"), 3, "nowhere: no such directory")
        self.refuse(fastdiff("extract", "--base", "a", "-o", tmp_path / "x"), 2, "--tuned", "--dataset")

    def test_a_stage_that_is_missing(self, fastdiff, tmp_path):
        self.refuse(fastdiff("analyze", tmp_path), 3, "fastdiff train")
        self.refuse(fastdiff("annotate", tmp_path), 3, f"fastdiff analyze {tmp_path}")
        self.refuse(fastdiff("compare", tmp_path), 3, f"fastdiff analyze {tmp_path}")
        self.refuse(fastdiff("report", tmp_path), 3, f"fastdiff compare {tmp_path}")

    def test_a_directory_that_is_no_store(self, fastdiff, tmp_path):
        (tmp_path / "acts").mkdir()
        self.refuse(fastdiff("train", tmp_path / "acts", "-o", tmp_path / "run"), 3, str(tmp_path / "acts"))

    def test_a_place_that_cannot_be_written_to(self, fastdiff, tmp_path):
        (tmp_path / "file").write_text("")
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        result = fastdiff("compare", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "file" / "x")
        self.refuse(result, 2, "choose another directory")

    def test_runs_that_cannot_be_compared(self, fastdiff, tmp_path):
        a, b, c = (tmp_path / name for name in "abc")
        for directory in (a, b, c):
            directory.mkdir()
        self.refuse(fastdiff("compare", a, b), 2, "-o")
        self.refuse(fastdiff("compare", a, "-o", b), 2, "in place")
        self.refuse(fastdiff("compare", a, b, c, "-o", tmp_path / "d"), 2, "got 3")

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (OSError(28, "No space left on device"), 4),
            (MemoryError(), 4),
            (PermissionError(13, "Permission denied", "/x"), 1),
            (KeyboardInterrupt(), 130),
        ],
    )
    def test_what_the_machine_refuses(self, monkeypatch, trained, tmp_path, capsys, error, code):
        def train(*_arguments, **_options):
            raise error

        monkeypatch.setattr("fastdiff.crosscoder.train.train_seeds", train)
        with pytest.raises(SystemExit) as ended:
            main(["train", str(tmp_path / "acts"), "-o", str(tmp_path / "run")])
        err = capsys.readouterr().err
        assert ended.value.code == code and "Traceback" not in err and err.strip().count("\n") == 0

    @pytest.mark.slow
    def test_a_locked_directory_and_the_installed_command(self, tmp_path):
        with rundir.locked(tmp_path / "run"):
            done = subprocess.run([FASTDIFF, "annotate", tmp_path / "run"], capture_output=True, text=True, timeout=60)
        self.refuse((done.returncode, done.stdout, done.stderr), 6, f"process {os.getpid()} on ", "is writing here")


class TestOutput:
    def test_json_is_one_document_on_stdout(self, fastdiff, trained, tmp_path):
        code, out, err = fastdiff("train", tmp_path / "acts", "-o", tmp_path / "run", "--json")
        # how far the result can be trusted is said in both
        said = json.loads(out)
        trust = said.pop("trust")
        assert code == 0 and [check["name"] for check in trust] == ["reconstruction", "sinks", "seeds"]
        assert err.splitlines() == [f"trust: {Check(**check).line()}" for check in trust]
        assert said == {
            "schema": 1,
            "run": str(tmp_path / "run"),
            "crosscoder": str(tmp_path / "run" / "crosscoder"),
            "crosscoders": [str(tmp_path / "run" / "crosscoder")],
            "left_out": {"rows": 3},
        }

    def test_progress_goes_to_stderr_and_quiet_silences_it(self, fastdiff, monkeypatch, trained, tmp_path):
        def train(store, out, config, progress, **options):
            progress.say("half way")
            rundir.write_json(out / "config.json", {"schema": 1})
            return [out]

        monkeypatch.setattr("fastdiff.crosscoder.train.train_seeds", train)
        command = ["train", tmp_path / "acts", "-o", tmp_path / "run"]
        code, out, err = fastdiff(*command)
        assert (code, out) == (0, f"{tmp_path / 'run'}\n") and err.startswith("half way\ntrust: reconstruction: ")
        for silent in (["-q"], ["--progress", "off"]):
            assert fastdiff(*command, *silent) == (0, f"{tmp_path / 'run'}\n", "")

    def test_the_template_is_a_configuration_file(self, fastdiff, trained, tmp_path):
        code, out, err = fastdiff("config", "init")
        assert (code, err) == (0, "")
        file = tmp_path / "fastdiff.yaml"
        file.write_text(out)
        assert set(yaml.safe_load(out)) == set(STAGES)
        assert fastdiff("train", tmp_path / "acts", "-o", tmp_path / "run", "-c", file)[0] == 0
        assert trained[-1][0] == TrainConfig()

    def test_the_schema_is_json(self, fastdiff):
        code, out, _ = fastdiff("config", "schema")
        assert code == 0 and set(json.loads(out)["properties"]) == set(STAGES)
