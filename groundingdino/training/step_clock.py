"""How long the parts of a training step take, by events of the device: nothing waits for them."""

import time
from typing import Any

import torch


class StepClock:
    """Collects one step at a time: `start`, a `mark` at the end of each part, `take`.

    On an accelerator a mark is an event in the stream, which is read once the step's losses have been.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = device.type in ("cuda", "npu")
        self._module = torch.get_device_module(device)
        self._marks: list[tuple[str, Any]] = []
        self._host: dict[str, float] = {}

    def start(self) -> None:
        """The step begins now."""
        self._marks = [("", self._now())]

    def mark(self, part: str) -> None:
        """The part that ends now. A part may end several times in a step; its times are added."""
        self._marks.append((part, self._now()))

    def add(self, part: str, seconds: float) -> None:
        """A part that was timed on the host."""
        self._host[part] = self._host.get(part, 0.0) + seconds

    def take(self) -> "StepMarks":
        """What was collected, which is forgotten here."""
        taken = StepMarks(self._marks, self._host, self._events)
        self._marks, self._host = [], {}
        return taken

    def _now(self) -> Any:
        if not self._events:
            return time.perf_counter()
        event = self._module.Event(enable_timing=True)
        event.record()
        return event


class StepMarks:
    """The marks of one step."""

    def __init__(self, marks: list[tuple[str, Any]], host: dict[str, float], events: bool) -> None:
        self._marks, self._host, self._events = marks, host, events

    def seconds(self) -> dict[str, float]:
        """Each part's time. The device must have passed the last mark, as it has where its results were read."""
        found = dict(self._host)
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            took = before.elapsed_time(after) / 1e3 if self._events else after - before
            found[part] = found.get(part, 0.0) + took
        return {part: round(took, 6) for part, took in found.items()}
