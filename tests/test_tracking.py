"""Trackers: what each package is told, that nothing leaves the machine, and that one that fails ends no training."""

import os
import subprocess
import sys
from contextvars import ContextVar
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from fastdiff import rundir
from fastdiff.errors import InputError, OptionError
from fastdiff.tracking import check_trackers, figures_of, open_trackers

MODELS = ["google/gemma-2-9b", "google/gemma-2-9b-it"]
LINE = {"loss": 1.5, "fve": [0.8, 0.75], "k": 32, "rows": "held-out", "seed": None}
FIGURES = {"loss": 1.5, "fve/gemma-2-9b": 0.8, "fve/gemma-2-9b-it": 0.75, "k": 32}
SETTINGS = {"k": 32, "matryoshka": [0.25, 0.5], "device": "auto"}


class Lines:
    """A Progress that keeps what is said."""

    def __init__(self):
        self.said = []

    def say(self, line):
        self.said.append(line)


class FakeRun:
    """What both packages call a run."""

    url = "https://wandb.example/run"

    def __init__(self):
        self.calls = []
        self.broken = False

    def log(self, figures, step):
        if self.broken:
            raise ConnectionError("the service\nis gone.")
        self.calls.append((step, figures))

    def finish(self, **how):
        if self.broken:
            raise ConnectionError("still gone")
        sys.stdout.write("* Run finished. Uploading logs")
        self.calls.append(how or "finished")


def package(monkeypatch, name, **contents):
    """Put a module in the place of a package."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def wandb(monkeypatch):
    inits, runs = [], []

    def init(**arguments):
        inits.append({**arguments, "reports": os.environ.get("WANDB_ERROR_REPORTING")})
        runs.append(FakeRun())
        return runs[-1]

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    # set and taken away, so that what the code sets is undone as well
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "")
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    return package(monkeypatch, "wandb", init=init, inits=inits, runs=runs, Settings=lambda **kwargs: kwargs)


@pytest.fixture
def trackio(monkeypatch, tmp_path):
    inits, runs = [], []
    current = ContextVar("current", default=None)
    names = ("TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")

    def init(**arguments):
        import huggingface_hub.constants

        sys.stdout.write("* Trackio project initialized")
        assert current.get() is None, "it would finish the run that is open"
        current.set("open")
        hub = huggingface_hub.constants.HF_HUB_OFFLINE
        inits.append({**arguments, "environment": {n: os.environ.get(n) for n in names}, "hub offline": hub})
        runs.append(FakeRun())
        return runs[-1]

    for name in names:
        monkeypatch.delenv(name, raising=False)
    directory = tmp_path.resolve() / "run" / "trackio"
    return package(monkeypatch, "trackio", init=init, inits=inits, runs=runs, current=current, TRACKIO_DIR=directory)


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


def trackers(kinds, run, name="seed-0", progress=None, start=0):
    return open_trackers(kinds, run, name, SETTINGS, progress or Lines(), start=start, models=MODELS)


def curve(run, tag, name="seed-0"):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(run / "tensorboard" / name))
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]


def test_figures_are_the_numbers_of_nested_facts():
    facts = {
        "fve": [0.5, float("inf")],
        "pair": (1, 2),
        "l0": 3,
        "rows": "held-out",
        "best": None,
        "frequency": {"edges": [0.0, 1.0, 2.0], "counts": []},
        "groups": {"source": {"chat": {"n_rows": 7, "fve": [0.1, None]}}, "role": {}},
    }
    assert figures_of(facts, ["base", "it"]) == {
        "fve/base": 0.5,
        "fve/it": float("inf"),
        "pair/base": 1,
        "pair/it": 2,
        "l0": 3,
        "groups/source/chat/n_rows": 7,
        "groups/source/chat/fve/base": 0.1,
    }


def test_no_trackers_is_fine(run):
    with trackers([], run) as opened:
        opened.log(1, LINE)
    assert list(run.iterdir()) == []


def test_models_of_one_short_name_are_numbered(run, wandb):
    with open_trackers(["wandb"], run, "seed-0", {}, start=0, models=["a/gemma", "b/gemma/"]) as opened:
        opened.log(1, LINE)
    assert set(wandb.runs[0].calls[0][1]) == {"loss", "fve/0", "fve/1", "k"}


def test_tensorboard_keeps_one_curve_over_a_kill(run):
    with trackers(["tensorboard"], run) as opened:
        for step in (10, 20, 30):
            opened.log(step, LINE)
    # killed at 30, with a checkpoint of 15
    with trackers(["tensorboard"], run, start=15) as opened:
        opened.log(20, LINE | {"loss": 2.0})
        opened.log(30, LINE)
    assert curve(run, "loss") == [(10, 1.5), (20, 2.0), (30, 1.5)]
    assert curve(run, "fve/gemma-2-9b-it") == [(10, 0.75), (20, 0.75), (30, 0.75)]
    assert not (run / "tracking.json").exists()


def test_tensorboard_begins_anew_from_step_0_for_this_seed_only(run):
    for name, step in (("seed-0", 7), ("seed-1", 7), ("seed-0", 5)):
        with trackers(["tensorboard"], run, name) as opened:
            opened.log(step, LINE)
    assert curve(run, "k") == [(5, 32)]
    assert curve(run, "k", "seed-1") == [(7, 32)]


def test_tensorboard_has_written_before_the_process_ends(run):
    with trackers(["tensorboard"], run) as opened:
        for step in (10, 20, 30):
            opened.log(step, LINE)
        assert curve(run, "loss") == [(10, 1.5), (20, 1.5), (30, 1.5)]


def test_wandb_is_offline_in_the_run(run, wandb):
    progress = Lines()
    with trackers(["wandb"], run, progress=progress) as opened:
        opened.log(10, LINE)
        opened.log(20, LINE)
    curves = rundir.read_json(run / "tracking.json", 1)["ids"]["seed-0"]
    assert wandb.inits == [
        {
            "project": "fastdiff",
            "name": "run-seed-0",
            "id": curves,
            "dir": str(run.resolve()),
            "mode": "offline",
            "config": SETTINGS,
            "resume": "allow",
            "reinit": "create_new",
            "settings": {"console": "off", "silent": True},
            "reports": "false",
        }
    ]
    assert wandb.runs[0].calls == [(10, FIGURES), (20, FIGURES), {"exit_code": 0}]
    assert progress.said == []


@pytest.mark.parametrize(("asked", "mode"), [("online", "online"), ("offline", "offline"), ("", "offline")])
def test_wandb_uploads_only_where_the_environment_says_online(run, wandb, monkeypatch, asked, mode):
    monkeypatch.setenv("WANDB_MODE", asked)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    progress = Lines()
    with trackers(["wandb"], run, progress=progress):
        pass
    assert (wandb.inits[0]["mode"], wandb.inits[0]["project"]) == (mode, "mine")
    assert wandb.inits[0]["reports"] == (None if mode == "online" else "false")
    assert progress.said == (["track: https://wandb.example/run"] if mode == "online" else [])


def test_a_training_that_did_not_end_well_is_marked_so(run, wandb):
    with pytest.raises(KeyboardInterrupt), trackers(["wandb"], run):
        raise KeyboardInterrupt
    assert wandb.runs[0].calls == [{"exit_code": 1}]


def test_trackio_is_local_and_says_nothing(run, trackio, capfd):
    progress = Lines()
    with trackers(["trackio"], run, progress=progress) as opened:
        opened.log(10, LINE)
    curves = rundir.read_json(run / "tracking.json", 1)["ids"]["seed-0"]
    directory = str(run.resolve() / "trackio")
    assert trackio.inits == [
        {
            "project": "fastdiff",
            "name": f"run-seed-0-{curves}",
            "config": SETTINGS,
            "resume": "allow",
            "embed": False,
            "auto_log_gpu": False,
            "auto_log_cpu": False,
            "environment": {"TRACKIO_DIR": directory, "TRACKIO_SPACE_ID": None, "TRACKIO_SERVER_URL": None},
            "hub offline": True,
        }
    ]
    assert trackio.runs[0].calls == [(10, FIGURES), "finished"]
    assert progress.said == [] and capfd.readouterr() == ("", "")
    assert "TRACKIO_DIR" not in os.environ


def test_several_seeds_are_open_at_once(run, trackio, wandb):
    kinds = ["trackio", "wandb", "tensorboard"]
    with trackers(kinds, run, "seed-0") as first, trackers(kinds, run, "seed-1") as second:
        first.log(10, LINE)
        second.log(10, LINE | {"loss": 2.0})
    for package in (trackio, wandb):
        assert [run.calls[0] for run in package.runs] == [(10, FIGURES), (10, FIGURES | {"loss": 2.0})]
    assert (curve(run, "loss"), curve(run, "loss", "seed-1")) == ([(10, 1.5)], [(10, 2.0)])


def test_a_run_that_the_caller_has_open_stays_open(run, trackio):
    token = trackio.current.set("mine")
    try:
        with trackers(["trackio"], run):
            assert trackio.current.get() == "mine"
    finally:
        trackio.current.reset(token)


def test_trackio_does_not_upload_where_the_environment_names_a_space(run, trackio, monkeypatch):
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    progress = Lines()
    with trackers(["trackio"], run, progress=progress):
        pass
    assert trackio.inits[0]["environment"]["TRACKIO_SPACE_ID"] is None
    assert os.environ["TRACKIO_SPACE_ID"] == "me/space"
    assert progress.said == ["track: trackio writes to this machine only; TRACKIO_SPACE_ID is not used"]


def test_trackio_keeps_its_directory_for_the_life_of_a_process(run, trackio, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "mine"))
    progress = Lines()
    with trackers(["trackio"], run, progress=progress):
        pass
    assert trackio.inits[0]["environment"]["TRACKIO_DIR"] == str((tmp_path / "mine").resolve())
    assert progress.said == [
        f"track: trackio was in use before in this process and keeps to {tmp_path.resolve() / 'run' / 'trackio'}"
    ]


def test_a_resumed_training_continues_the_same_curves_and_a_new_one_does_not(run, wandb, trackio):
    for name, start in (("seed-0", 0), ("seed-1", 0), ("seed-0", 40), ("seed-0", 0), ("seed-2", 40)):
        with trackers(["wandb", "trackio"], run, name, start=start):
            pass
    first, other, continued, anew, late = (init["id"] for init in wandb.inits)
    assert continued == first and len({first, other, anew, late}) == 4
    assert [init["name"].rpartition("-")[2] for init in trackio.inits] == [first, other, continued, anew, late]
    assert rundir.read_json(run / "tracking.json", 1)["ids"] == {"seed-0": anew, "seed-1": other, "seed-2": late}


def test_an_unreadable_tracking_json_is_named(run, wandb):
    (run / "tracking.json").write_text("{")
    with pytest.raises(InputError, match=r"tracking\.json: not readable"), trackers(["wandb"], run, start=5):
        pass


def test_one_that_fails_is_left_out_and_said_once(run, wandb, trackio):
    progress = Lines()
    with trackers(["wandb", "trackio", "wandb"], run, progress=progress) as opened:
        opened.log(10, LINE)
        wandb.runs[0].broken = True
        for step in (20, 30):
            opened.log(step, LINE)
    assert len(wandb.runs) == 1  # asked for twice
    assert wandb.runs[0].calls == [(10, FIGURES)]
    assert trackio.runs[0].calls == [(10, FIGURES), (20, FIGURES), (30, FIGURES), "finished"]
    assert progress.said == [
        "track: warning: wandb failed at step 20 (ConnectionError: the service is gone) and gets nothing more; "
        "events.jsonl has all figures"
    ]


def test_one_that_fails_at_the_end_does_not_hide_what_ended_the_training(run, wandb, trackio):
    progress = Lines()
    with pytest.raises(InputError, match="the store"), trackers(["wandb", "trackio"], run, progress=progress):
        wandb.runs[0].broken = True
        raise InputError("the store")
    assert trackio.runs[0].calls == ["finished"]
    assert progress.said == ["track: warning: wandb may lack the last figures (ConnectionError: still gone)"]


def test_tensorboard_on_a_full_disk_does_not_end_a_training(run, monkeypatch):
    progress = Lines()
    with trackers(["tensorboard"], run, progress=progress) as opened:
        monkeypatch.setattr(
            "tensorboard.summary.writer.record_writer.RecordWriter.write", lambda *_: [][0], raising=True
        )
        monkeypatch.setattr("threading.excepthook", lambda _: None)
        for step in range(10):
            opened.log(step, LINE)
    assert len(progress.said) == 1 and "tensorboard failed at step" in progress.said[0]


def test_one_that_cannot_start_is_one_line_and_ends_the_others(run, wandb, trackio):
    def init(**_):
        raise PermissionError(13, "Permission denied")

    trackio.init = init
    with pytest.raises(OptionError) as error, trackers(["wandb", "trackio"], run):
        pass
    assert str(error.value) == (
        "--track trackio: PermissionError: [Errno 13] Permission denied; mend that, or leave it out"
    )
    assert wandb.runs[0].calls == [{"exit_code": 1}]


@pytest.mark.parametrize(
    "opening", [lambda kinds, run: trackers(kinds, run).__enter__(), lambda k, _: check_trackers(k)]
)
def test_a_package_that_is_not_installed_is_one_line(run, monkeypatch, opening):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError) as error:
        opening(["wandb"], run)
    assert str(error.value) == (
        "--track wandb: not installed; pip install -c constraints.txt -e '.[track]', or pip install wandb"
    )
    assert list(run.iterdir()) == []


def test_a_package_is_loaded_only_when_it_is_asked_for(tmp_path):
    code = """
import sys
from pathlib import Path
from fastdiff.tracking import check_trackers, open_trackers

check_trackers(["tensorboard"])
with open_trackers([], Path(sys.argv[1]), "seed-0", {}, start=0, models=[]) as opened:
    opened.log(1, {"loss": 1.0})
print([m for m in ("torch", "tensorboard", "trackio", "wandb", "huggingface_hub") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-P", "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)
