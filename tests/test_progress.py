"""Progress: silent, plain lines off a terminal, and a rate that counts only this process's work."""

import re

import pytest

from fastdiff.progress import SILENT, Progress


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.mark.parametrize(
    "progress", [SILENT, Progress("off"), Progress("auto", quiet=True), Progress("on", quiet=True)]
)
def test_silent_prints_nothing(progress, capfd):
    progress.say("a line")
    with progress.task("work", 10, "rows") as task:
        for _ in range(10):
            task.advance(1, "note")
    assert capfd.readouterr() == ("", "")


def test_off_a_terminal_there_are_plain_lines_and_always_the_last_one(capfd, clock):
    progress = Progress("auto")
    progress.say("begin")
    with progress.task("train", 2000, "steps") as task:
        for _ in range(2000):
            clock.now += 0.012
            task.advance(1, "loss 1.5")
    out, err = capfd.readouterr()
    assert out == "" and "\r" not in err and "\x1b" not in err
    lines = err.splitlines()
    assert lines[0] == "begin"
    # 24 s of work: a line each 10 s, and the end
    assert [line.split(" steps")[0] for line in lines[1:]] == [
        "train: 834/2,000",
        "train: 1,668/2,000",
        "train: 2,000/2,000",
    ]
    assert lines[-1] == "train: 2,000/2,000 steps, 83/s, 0 s left  loss 1.5"


def test_a_quick_task_still_gets_its_last_line(capfd):
    with Progress("auto").task("extract", 3, "tokens") as task:
        task.advance(2)
        task.advance(1)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and re.fullmatch(r"extract: 3/3 tokens, [\d,]+/s, 0 s left", lines[0])


def test_work_of_an_earlier_process_counts_as_done_but_not_as_speed(capfd, clock):
    with Progress("auto").task("train", 20_000, "steps", start=15_000) as task:
        clock.now += 10
        task.advance(100)
    assert capfd.readouterr().err == "train: 15,100/20,000 steps, 10/s, 490 s left\n"


def test_forced_bars_go_to_stderr_only(capfd):
    with Progress("on").task("train", 5, "steps", start=2) as task:
        task.advance(3, "loss 1.5")
        assert task.done == 5
    assert capfd.readouterr().out == ""


def test_a_line_shows_the_latest_note(capfd, clock):
    with Progress("auto").task("train", 100, "steps") as task:
        for i in range(100):
            clock.now += 0.3
            task.advance(1, f"loss {i}" if i % 50 == 9 else "")
    lines = capfd.readouterr().err.splitlines()
    assert [line.split("left")[1].strip() for line in lines] == ["loss 9", "loss 59", "loss 59"]
