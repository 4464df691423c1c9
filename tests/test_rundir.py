"""Run directories: whole files or none, one writer, and marks that prove what they say."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastdiff import rundir
from fastdiff.errors import InputError, LockedError, OptionError, ResourceError

CONFIG = {"k": 3, "name": "a"}
INPUTS = {"store": "0" * 64}


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, timeout=60)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def stage(tmp_path):
    """A finished stage with two outputs."""
    directory = tmp_path / "stage"
    rundir.begin(directory)
    (directory / "a.txt").write_text("one")
    (directory / "b.txt").write_text("two")
    rundir.finish(directory, "work", CONFIG, INPUTS, ["a.txt", "b.txt"])
    return directory


class TestAtomicFiles:
    def test_a_block_that_ends_well_replaces_the_file(self, tmp_path):
        path = tmp_path / "deep" / "file"
        for text in ("old", "new"):
            rundir.write_text(path, text)
            assert path.read_text() == text
        assert names(path.parent) == ["file"]

    @pytest.mark.parametrize("before", [None, "old"])
    @pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.EACCES, "denied")])
    def test_an_exception_leaves_what_was_there(self, tmp_path, before, error):
        path = tmp_path / "file"
        if before is not None:
            path.write_text(before)
        with pytest.raises(type(error)), rundir.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise error
        assert names(tmp_path) == ([] if before is None else ["file"])
        assert before is None or path.read_text() == before

    def test_a_killed_process_leaves_the_old_file_and_a_later_one_succeeds(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("old")
        code = (
            "import os, pathlib, signal, sys\n"
            "from fastdiff.rundir import atomic_path\n"
            "with atomic_path(pathlib.Path(sys.argv[1])) as t:\n"
            "    t.write_text('half')\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        assert python(code, str(path)).returncode == -signal.SIGKILL
        assert path.read_text() == "old"
        rundir.write_text(path, "new")
        assert path.read_text() == "new" and names(tmp_path) == ["file"]

    def test_the_file_is_on_disk_before_it_gets_its_name(self, tmp_path, monkeypatch):
        path = tmp_path / "file"
        path.write_text("old")
        synced = []
        real = os.fsync

        def fsync(fd):
            synced.append((Path(f"/proc/self/fd/{fd}").readlink(), path.read_text()))
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        rundir.write_text(path, "new")
        assert [(file.name, seen) for file, seen in synced] == [
            (".file.tmp", "old"),
            (tmp_path.name, "new"),
        ]

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk_is_a_resource_error_that_names_the_file(self, tmp_path, monkeypatch, code):
        path = tmp_path / "file"
        path.write_text("old")

        def full(fd):
            raise OSError(code, "full")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match=f"{path}: no space left") as caught:
            rundir.write_text(path, "new")
        assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
        assert names(tmp_path) == ["file"] and path.read_text() == "old"

    def test_nan_is_not_written(self, tmp_path):
        with pytest.raises(ValueError):
            rundir.write_json(tmp_path / "x.json", {"x": math.nan})
        assert names(tmp_path) == []


class TestLock:
    def test_a_second_process_is_refused_by_the_first_ones_number(self, tmp_path):
        code = (
            "import pathlib, sys\n"
            "from fastdiff.errors import LockedError\n"
            "from fastdiff.rundir import locked\n"
            "try:\n"
            "    with locked(pathlib.Path(sys.argv[1])): print('in')\n"
            "except LockedError as error: print(error)\n"
        )
        with rundir.locked(tmp_path / "run"):
            refused = python(code, str(tmp_path / "run"))
            assert f"process {os.getpid()} on " in refused.stdout
            assert str(tmp_path / "run") in refused.stdout and refused.stdout.count("\n") == 1
        assert python(code, str(tmp_path / "run")).stdout == "in\n"
        with rundir.locked(tmp_path / "run"):
            pass

    def test_a_killed_process_holds_nothing(self, tmp_path):
        code = (
            "import os, pathlib, signal, sys\n"
            "from fastdiff.rundir import locked\n"
            "with locked(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        assert python(code, str(tmp_path)).returncode == -signal.SIGKILL
        with rundir.locked(tmp_path):
            pass

    def test_an_exception_inside_releases_it_and_goes_through(self, tmp_path):
        with pytest.raises(PermissionError), rundir.locked(tmp_path):
            raise PermissionError(errno.EACCES, "of the block")
        with rundir.locked(tmp_path), pytest.raises(LockedError), rundir.locked(tmp_path):
            raise AssertionError("two writers")

    def test_a_place_that_cannot_be_a_directory_is_an_option_error(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(OptionError, match="choose another directory"), rundir.locked(tmp_path / "file" / "run"):
            pass


class TestMarks:
    def test_done_only_for_the_same_stage_config_and_inputs(self, stage):
        assert rundir.is_done(stage, "work", CONFIG, INPUTS)
        assert rundir.is_done(stage, "work", dict(reversed(CONFIG.items())), INPUTS)
        assert not rundir.is_done(stage, "other", CONFIG, INPUTS)
        assert not rundir.is_done(stage, "work", {**CONFIG, "k": 4}, INPUTS)
        assert not rundir.is_done(stage, "work", {**CONFIG, "new": None}, INPUTS)
        assert not rundir.is_done(stage, "work", CONFIG, {"store": "1" * 64})
        assert not rundir.is_done(stage, "work", CONFIG, {**INPUTS, "more": "0" * 64})
        assert not rundir.is_done(stage.parent / "elsewhere", "work", CONFIG, INPUTS)

    def test_config_and_inputs_cannot_trade_places(self, tmp_path):
        rundir.begin(tmp_path)
        rundir.finish(tmp_path, "work", {"x": "1"}, {}, [])
        assert not rundir.is_done(tmp_path, "work", {}, {"x": "1"})

    @pytest.mark.parametrize("name", ["a.txt", "b.txt"])
    def test_one_flipped_bit_is_not_done(self, stage, name):
        data = bytearray((stage / name).read_bytes())
        data[1] ^= 1
        (stage / name).write_bytes(data)
        assert not rundir.is_done(stage, "work", CONFIG, INPUTS)
        with pytest.raises(InputError, match=rf"{name}: gone or changed .* run `fastdiff work X` again"):
            rundir.require_done(stage, "fastdiff work X")

    def test_a_missing_output_is_not_done_and_the_message_names_the_command(self, stage):
        (stage / "b.txt").unlink()
        assert not rundir.is_done(stage, "work", CONFIG, INPUTS)
        with pytest.raises(InputError, match=r"b\.txt: gone .* run `fastdiff work X` again"):
            rundir.require_done(stage, "fastdiff work X")

    def test_files_without_a_mark_prove_nothing(self, stage):
        rundir.begin(stage)
        assert names(stage) == [".DONE.json.before", "a.txt", "b.txt"]
        assert not rundir.is_done(stage, "work", CONFIG, INPUTS)
        with pytest.raises(InputError, match=r"not complete; run `fastdiff work X` first"):
            rundir.require_done(stage, "fastdiff work X")

    def test_a_stage_is_not_marked_when_an_output_is_missing(self, tmp_path):
        rundir.begin(tmp_path)
        with pytest.raises(InputError, match="never"):
            rundir.finish(tmp_path, "work", CONFIG, INPUTS, ["never"])
        assert names(tmp_path) == []

    def test_the_mark_of_a_finished_stage_is_returned(self, stage):
        done = rundir.require_done(stage, "x")
        assert (done["config"], done["inputs"], set(done["outputs"])) == (CONFIG, INPUTS, {"a.txt", "b.txt"})

    def test_the_mark_does_not_depend_on_when_it_is_made(self, stage, monkeypatch):
        before = (stage / rundir.DONE).read_bytes()
        monkeypatch.setattr("time.time", lambda: 2e9)
        monkeypatch.setattr("time.gmtime", lambda *_: (_ for _ in ()).throw(AssertionError("clock was read")))
        rundir.begin(stage)
        rundir.finish(stage, "work", CONFIG, INPUTS, ["a.txt", "b.txt"])
        assert (stage / rundir.DONE).read_bytes() == before


class TestReading:
    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ('{"schema": 2}', "schema 2"),
            ('{"x": 1}', "schema None"),
            ("[1]", "schema 'list'"),
            ("", "not readable as JSON"),
            ('{"schema": 1', "not readable as JSON"),
            ("\xff", "not readable as JSON"),
        ],
    )
    def test_what_is_not_this_schema_is_refused(self, tmp_path, text, says):
        path = tmp_path / "x.json"
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match=says) as caught:
            rundir.read_json(path, 1)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    def test_a_missing_file_and_a_directory_are_input_errors(self, tmp_path):
        with pytest.raises(InputError, match="no such file"):
            rundir.read_json(tmp_path / "x.json", 1)
        with pytest.raises(InputError, match="not readable"):
            rundir.read_json(tmp_path, 1)
        with pytest.raises(InputError, match="cannot be read"):
            rundir.sha256_file(tmp_path / "x")

    def test_a_mark_of_another_schema_is_refused_not_overwritten(self, tmp_path):
        (tmp_path / rundir.DONE).write_text('{"schema": 99}')
        with pytest.raises(InputError, match="schema 99"):
            rundir.is_done(tmp_path, "work", CONFIG, INPUTS)

    def test_written_json_reads_back(self, tmp_path):
        value = {"schema": 1, "text": "é\u2028\x85 \x00", "n": [1, 2.5, None]}
        rundir.write_json(tmp_path / "x.json", value)
        assert rundir.read_json(tmp_path / "x.json", 1) == value


def test_canonical_json_is_the_same_for_equal_values():
    assert rundir.canonical_json({"b": [1, {"y": 1, "x": "é"}], "a": None}) == '{"a":null,"b":[1,{"x":"é","y":1}]}'
    with pytest.raises(ValueError):
        rundir.canonical_json(math.inf)


def test_record_keeps_what_other_stages_wrote(tmp_path):
    rundir.record(tmp_path, "train", {"k": 1, "name": "ü"}, store="/acts")
    rundir.record(tmp_path, "analyze", {"cards": 2})
    rundir.record(tmp_path, "train", {"k": 5})
    assert yaml.safe_load((tmp_path / "fastdiff.yaml").read_text()) == {
        "train": {"k": 5},
        "analyze": {"cards": 2},
    }
    stages = rundir.read_manifest(tmp_path)["stages"]
    assert set(stages) == {"train", "analyze"}
    assert "store" not in stages["train"] and stages["analyze"]["command"] == sys.argv
    assert stages["analyze"]["versions"]["python"].startswith("3.")


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00"])
def test_record_refuses_a_configuration_it_cannot_keep(tmp_path, text):
    (tmp_path / "fastdiff.yaml").write_text(text)
    with pytest.raises(InputError, match=r"fastdiff\.yaml.*delete it"):
        rundir.record(tmp_path, "train", {"k": 1})
    assert (tmp_path / "fastdiff.yaml").read_text() == text


def test_record_accepts_an_empty_configuration(tmp_path):
    (tmp_path / "fastdiff.yaml").write_text("")
    rundir.record(tmp_path, "train", {"k": 1})
    assert yaml.safe_load((tmp_path / "fastdiff.yaml").read_text()) == {"train": {"k": 1}}


class TestEvents:
    def test_lines_are_appended_and_what_json_cannot_hold_is_null(self, tmp_path):
        events = rundir.Events(tmp_path / "run")
        events.write("train", step=1, loss=math.nan, fve=[0.5, -math.inf], deep={"x": (math.inf, "a\nb")})
        rundir.Events(tmp_path / "run").write("train", step=2)
        lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()

        def refuse(name):
            raise AssertionError(name)

        first, second = (json.loads(line, parse_constant=refuse) for line in lines)
        assert (first["loss"], first["fve"], first["deep"]) == (None, [0.5, None], {"x": [None, "a\nb"]})
        assert second["step"] == 2 and second["time"] >= first["time"] > 1.6e9

    def test_a_full_disk_is_a_resource_error(self, tmp_path, monkeypatch):
        events = rundir.Events(tmp_path)

        def full(*_arguments, **_options):
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(ResourceError, match=r"events\.jsonl: no space"):
            events.write("train", step=1)


KILLED = """
import os, sys
from pathlib import Path
from fastdiff import rundir

run, at = Path(sys.argv[1]), int(sys.argv[2])
steps = iter(range(100))

def dying(function):
    def instead(*arguments, **options):
        if next(steps) == at:
            os._exit(9)
        return function(*arguments, **options)
    return instead

# every whole file that is written, before and after, and the mark that goes
for name in ("begin", "write_json", "write_text"):
    setattr(rundir, name, dying(getattr(rundir, name)))
rundir.write_json = dying(rundir.write_json)
with rundir.locked(run) as lock:
    stage = lock.stage(run / "work", "work", {"k": 4}, {"store": "0"}, ["a.txt"])
    assert not stage.up_to_date()
    with stage:
        rundir.write_text(run / "work" / "a.txt", "new")
        rundir.write_text(run / "work" / "a.txt", "new")
"""


class TestStages:
    def work(self, run: Path, k: int) -> bool:
        """Make the stage; whether there was anything to do."""
        with rundir.locked(run) as lock:
            stage = lock.stage(run / "work", "work", {"k": k}, {"store": "0"}, ["a.txt"])
            if stage.up_to_date():
                return False
            with stage:
                rundir.write_text(run / "work" / "a.txt", str(k))
        return True

    def test_it_is_done_once(self, tmp_path):
        assert self.work(tmp_path, 4) and not self.work(tmp_path, 4) and self.work(tmp_path, 5)
        assert list(rundir.read_manifest(tmp_path)["stages"]) == ["work"]
        assert yaml.safe_load((tmp_path / "fastdiff.yaml").read_text()) == {"work": {"k": 5}}

    @pytest.mark.slow
    def test_killed_anywhere_it_is_done_again_or_was_recorded(self, tmp_path):
        """Before, between and after all writes; never does a stage count as done that the manifest does not know."""
        died = 0
        for at in range(40):
            run = tmp_path / str(at)
            self.work(run, 3)
            (run / "manifest.json").unlink()
            code = python(KILLED, str(run), str(at)).returncode
            assert code in (0, 9)
            with rundir.locked(run) as lock:
                stage = lock.stage(run / "work", "work", {"k": 4}, {"store": "0"}, ["a.txt"])
                if stage.up_to_date():
                    assert "work" in rundir.read_manifest(run)["stages"]
                    assert (run / "work" / "a.txt").read_text() == "new"
            self.work(run, 4)
            assert not self.work(run, 4) and "work" in rundir.read_manifest(run)["stages"]
            if code == 0:
                break
            died += 1
        assert code == 0 and died >= 6

    def test_an_exception_leaves_no_mark_and_no_record(self, tmp_path):
        with rundir.locked(tmp_path) as lock:
            stage = lock.stage(tmp_path / "work", "work", {}, {}, [])
        with pytest.raises(RuntimeError, match="x"), stage:
            raise RuntimeError("x")
        assert names(tmp_path / "work") == [] and not (tmp_path / "manifest.json").exists()

    def test_outputs_of_another_schema_are_not_up_to_date(self, tmp_path):
        with rundir.locked(tmp_path) as lock:

            def stage(schema):
                schemas = {"a.json": schema}
                return lock.stage(tmp_path / "work", "work", {}, {}, ["a.json"], schemas=schemas, recorded=False)

            with stage(1):
                rundir.write_json(tmp_path / "work" / "a.json", {"schema": 1})
            assert stage(1).up_to_date() and not stage(2).up_to_date()
        assert not (tmp_path / "manifest.json").exists()

    @pytest.mark.parametrize("error", [InputError, KeyboardInterrupt, SystemExit])
    def test_what_was_there_before_still_counts_if_nothing_of_it_changed(self, tmp_path, error):
        work = tmp_path / "work"

        def make(k, *, then=None, text=None):
            with rundir.locked(tmp_path) as lock:
                stage = lock.stage(work, "work", {"k": k}, {}, ["a.txt"])
                with stage:
                    if text is not None:
                        rundir.write_text(work / "a.txt", text)
                    if then is not None:
                        raise then("stop")

        make(1, text="one")
        mark = (work / rundir.DONE).read_bytes()
        with pytest.raises(error):
            make(2, then=error)
        assert (work / rundir.DONE).read_bytes() == mark and names(work) == [rundir.DONE, "a.txt"]
        # the first of several files was already replaced
        with pytest.raises(error):
            make(2, then=error, text="two")
        assert not (work / rundir.DONE).exists()
        make(3, text="three")
        assert names(work) == [rundir.DONE, "a.txt"]

    @pytest.mark.parametrize(
        ("name", "text"), [("fastdiff.yaml", "- a"), ("manifest.json", "{"), ("manifest.json", '{"schema": 1}')]
    )
    def test_a_run_whose_records_cannot_be_read_is_refused_before_the_work(self, tmp_path, name, text):
        with rundir.locked(tmp_path) as lock:
            stage = lock.stage(tmp_path / "work", "work", {}, {}, [])
            with stage:
                pass
            (tmp_path / name).write_text(text)
            with pytest.raises(InputError, match=name.replace(".", r"\.")), stage:
                raise AssertionError("the work was begun")
        assert (tmp_path / "work" / rundir.DONE).exists()

    @pytest.mark.parametrize("text", ["", "junk", "[]", "{}", '{"schema": 1}', '{"schema": 1, "outputs": []}'])
    def test_a_damaged_mark_is_none_and_says_what_to_run(self, tmp_path, text):
        (tmp_path / rundir.DONE).write_text(text)
        assert not rundir.is_done(tmp_path, "work", CONFIG, INPUTS)
        with pytest.raises(InputError, match=r"DONE\.json: .*; run `fastdiff work X` again"):
            rundir.require_done(tmp_path, "fastdiff work X")
