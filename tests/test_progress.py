"""Progress: silent, plain lines off a terminal, and a rate that counts only this process's recent work."""

import os
import pty
import re
import subprocess
import sys

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
    assert capfd.readouterr().err == "train: 15,100/20,000 steps, 10/s, 8 min 10 s left\n"


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


def test_a_rate_in_another_unit_and_a_note_that_would_not_fit_stay_within_80_columns(capfd, clock):
    note = "fve 0.823 0.811  l0 100.2  dead 3.2%  wait 2%"
    with Progress("auto").task("train", 200_000, "steps", start=150_000, rate=(4096, "tokens")) as task:
        for _ in range(80):
            clock.now += 0.125
            task.advance(1, note)
    assert capfd.readouterr().err.splitlines() == [
        "train: 150,080/200,000 steps, 32,768 tokens/s, 1 h 44 min left",
        f"  {note}",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (119, "119 s"), (121, "2 min 1 s"), (3599, "59 min 59 s"), (7300, "2 h 1 min"), (2e5, "2 d 7 h")],
)
def test_time_left(capfd, clock, seconds, text):
    with Progress("auto").task("train", 2, "steps") as task:
        clock.now += seconds
        task._shown = 0.0  # a line is due
        task.advance(1)
    assert capfd.readouterr().err.endswith(f", {text} left\n")


def test_less_than_ten_a_second_is_shown_with_a_decimal(capfd, clock):
    with Progress("auto").task("train", 3, "steps") as task:
        clock.now += 24
        task.advance(3)
    assert ", 0.12/s, " in capfd.readouterr().err


def test_speed_follows_recent_work(capfd, clock):
    with Progress("auto").task("train", 100_000, "steps") as task:
        clock.now += 300  # a slow start, such as the compilation of kernels
        task.advance(1)
        assert task._status().startswith("0.0033/s")
        for _ in range(3000):
            clock.now += 0.1
            task.advance(1)
    # five minutes later: the mean since the start would still be 5
    assert re.match(r"9\.9/s, 2 h 4\d min left", task._status())


def test_units_counted_within_no_time_are_not_lost(clock):
    with Progress("off").task("train", 10, "steps") as task:
        clock.now += 2
        task.advance(1)
        task.advance(3)
        assert task._status() == "2/s, 3 s left"


ON_A_TERMINAL = """
import time
from fastdiff.progress import Progress

progress = Progress()
with progress.task("train", 2000, "steps", start=1000, rate=(4096, "tokens")) as task:
    for i in range(4):
        time.sleep(0.15)
        task.advance(100, "fve 0.823 0.811 [bold]  l0 100.2")
    progress.say("a line between")
    task.advance(600, "fve 0.9")
"""


def on_a_terminal(**environment):
    """What the script writes to a terminal of 80 columns."""
    own, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", ON_A_TERMINAL],
        stderr=its,
        stdout=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", **environment},
    )
    os.close(its)
    text = b""
    try:
        while chunk := os.read(own, 65536):
            text += chunk
    except OSError:  # how Linux says that the other side has closed it
        pass
    os.close(own)
    assert (process.communicate(timeout=60)[0], process.returncode) == (b"", 0)
    return text.decode()


def test_on_a_terminal_a_bar_with_its_note_below():
    text = on_a_terminal(NO_COLOR="1")
    assert re.search("\x1b\\[[\\d;]*3[0-9]", text) is None, "a colour in spite of NO_COLOR"
    plain = re.sub("\x1b\\[[\\d;?]*[A-Za-z]", "", text)
    lines = re.split("[\r\n]+", plain)
    assert "a line between" in lines
    bars = [line for line in lines if "tokens/s" in line]
    assert any(re.fullmatch(r"train +\S+ +1[1-4]00/2000 +[\d,]+ tokens/s, \d+ s left *", line) for line in bars)
    assert any(line.strip() == "fve 0.823 0.811 [bold]  l0 100.2" for line in lines)
    assert max(map(len, lines)) <= 80


def test_a_terminal_without_a_cursor_gets_lines():
    assert re.fullmatch(
        r"a line between\r\ntrain: 2,000/2,000 steps, [\d,]+ tokens/s, 0 s left  fve 0.9\r\n",
        on_a_terminal(TERM="dumb"),
    )
