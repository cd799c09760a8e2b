"""Ending a run early with nothing lost: on a signal, or before its time is up."""

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SAME_SIGNAL = 2.0  # seconds: torchrun passes on a signal that its processes have had from the terminal already


class RunStopped(Exception):
    """A run has ended early because it was asked to; its state is saved."""


class StopRequest:
    """Whether a run should end early. Made by the program, asked by the trainer after each step."""

    def __init__(self, max_time: str | None = None) -> None:
        """`max_time`: such as "3h50m", counted from now; None without a limit. ValueError for another form."""
        self._start = self._last = time.monotonic()
        self._limit = None if max_time is None else seconds(max_time)
        self._limit_text = max_time
        self._longest = 0.0  # seconds between two questions: the next one may be as far away
        self._signal: str | None = None
        self._signal_time = 0.0
        self.at_once = True  # nothing is under way that would be lost: a signal need not wait for the next question

    def reason(self) -> str | None:
        """Why the run should end now; None to go on."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        if self._signal is not None:
            return self._signal
        if self._limit is not None and now - self._start + self._longest >= self._limit:
            return f"--max-time {self._limit_text}"
        return None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is not None and now - self._signal_time > SAME_SIGNAL:
            raise KeyboardInterrupt  # the second time: now
        if self._signal is None:
            self._signal, self._signal_time = signal.Signals(number).name, now
        if self.at_once:
            raise RunStopped(f"stopped by {self._signal}")


@contextlib.contextmanager
def stop_on_signals(request: StopRequest) -> Iterator[StopRequest]:
    """Let SIGINT, SIGTERM, SIGUSR1 and SIGHUP end the run at its next step. The handlers before are back afterwards.

    For programs. Outside of the main thread signals remain as they are, as Python wants it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._receive) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def seconds(duration: str) -> float:
    """ "3h50m", "90m", "45s", "1d12h" -> seconds. ValueError for anything else."""
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", duration.strip())
    if found is None or not any(found.groups()):
        raise ValueError(f"max_time {duration!r}: expected days, hours, minutes, seconds, such as 3h50m or 90m")
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + rest
