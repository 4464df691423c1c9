"""Requests to stop: one signal asks, a second ends at once, and handlers are as they were afterwards."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from fastdiff.interrupt import stop_requests

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
CODES = {signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def handlers():
    """Whatever a test does, the handlers are those from before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_leave_ends(number):
    with stop_requests() as stop:
        assert stop.signal is None
        send(number)
        assert stop.signal == number
    with pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
        stop.leave()
    if number == signal.SIGINT:
        assert ended.type is KeyboardInterrupt
    else:
        assert ended.type is SystemExit and ended.value.code == CODES[number]


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_at_once(first, second):
    with pytest.raises((KeyboardInterrupt, SystemExit)) as ended, stop_requests() as stop:
        send(first)
        send(second)
        pytest.fail("the second signal did not end the block")
    assert stop.signal == first
    if second == signal.SIGINT:
        assert ended.type is KeyboardInterrupt
    else:
        assert ended.type is SystemExit and ended.value.code == CODES[second]


@pytest.mark.parametrize("error", [None, ValueError])
def test_handlers_are_restored(error):
    def own(_number, _frame): ...

    for number in SIGNALS:
        signal.signal(number, own)
    try:
        with stop_requests():
            assert all(signal.getsignal(number) is not own for number in SIGNALS)
            if error:
                raise error
    except ValueError:
        pass
    assert all(signal.getsignal(number) is own for number in SIGNALS)


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_requests() as stop:
        send(signal.SIGHUP)
        assert stop.signal is None
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_outside_the_main_thread_nothing_is_installed():
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def work():
        with stop_requests() as stop:
            seen.append(([signal.getsignal(number) for number in SIGNALS], stop.signal))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)]


def test_leave_without_a_request_is_a_mistake():
    with stop_requests() as stop, pytest.raises(RuntimeError, match="nobody asked"):
        stop.leave()


COMMAND = """
import sys, time
import click
import fastdiff.cli
from fastdiff.interrupt import stop_requests

@fastdiff.cli.cli.command()
def steps():
    with stop_requests() as stop:
        print("ready", flush=True)
        while stop.signal is None:
            time.sleep(0.01)
        if len(sys.argv) > 1:
            print("asked", flush=True)
            time.sleep(60)
    print("saved", flush=True)
    stop.leave()

fastdiff.cli.main(["steps"])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("impatient", [False, True], ids=["once", "twice"])
def test_the_command_line_ends_with_the_code_of_the_signal(number, code, impatient):
    arguments = [sys.executable, "-P", "-c", COMMAND, *["impatient"] * impatient]
    # as from a terminal: a shell without job control lets what runs in its background ignore SIGINT
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        if impatient:
            assert process.stdout.readline() == "asked\n"
            process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in err
    assert out == ("" if impatient else "saved\n")
