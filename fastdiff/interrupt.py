"""Requests to stop: a signal asks, the work ends where it can be continued."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

# SIGHUP: the terminal was closed
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequests:
    """What `stop_requests` gives: `signal` is the number of the first request, None while there is none."""

    signal: int | None = None

    def leave(self) -> NoReturn:
        """End the program as the request would have ended it: exit code 130, 143 or 129.

        Raises:
            KeyboardInterrupt: It was SIGINT.
            SystemExit: It was SIGTERM or SIGHUP.
        """
        if self.signal is None:
            raise RuntimeError("nobody asked to stop")
        _leave(self.signal)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            _leave(number)
        self.signal = number


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Within the block the first SIGTERM, SIGINT or SIGHUP only sets `signal`; a second one ends the program at once.

    Whoever opens the block looks at `signal` where it can stop, and once more behind the block, and calls `leave`.
    Signals that the process ignores (SIGHUP under nohup) stay ignored, and outside the main thread, where Python
    allows no handlers, all stay as they are.
    """
    requests = StopRequests()
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                # None: installed by something other than Python, which could not be restored
                if handler not in (signal.SIG_IGN, None):
                    before[number] = handler
                    signal.signal(number, requests._handle)
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    # what a shell reports of a process that a signal ended
    raise SystemExit(128 + number)
