"""A trace of some training steps, and the operators that took longest in them."""

import csv
import logging
from pathlib import Path
from typing import Any

import torch

LONGEST = 10

logger = logging.getLogger(__name__)


def steps_of(text: str) -> tuple[int, int]:
    """ "10:13" -> (10, 13): from the beginning of step 10 to the beginning of step 13. ValueError for anything else."""
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and 0 < int(first) < int(end)):
        raise ValueError(f"profile {text!r}: give the first step and the one to end before, such as 10:13")
    return int(first), int(end)


class StepProfiler:
    """Profiles the steps that `profile` names into `folder`: torch.profiler, on an NPU torch_npu.profiler."""

    def __init__(self, profile: str | None, folder: Path, device: torch.device) -> None:
        self._first, self._end = (0, 0) if profile is None else steps_of(profile)
        self._folder, self._device = folder, device
        self._running: Any = None

    def before(self, step: int) -> None:
        """Call before step number `step`, 1 = the first; starts and ends the trace."""
        if step == self._first:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._running = _profiler(self._device, self._folder)
            self._running.start()
        elif step >= self._end:
            self.close()

    def close(self) -> None:
        """End the trace if one is running, and log the operators that took longest."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        if self._device.type == "npu":  # its handler has written the trace and the tables
            lines = longest_in_tables(self._folder)
        else:
            running.export_chrome_trace(str(self._folder / "trace.json"))
            lines = _longest(running, self._device)
        logger.info(f"trace of steps {self._first} to {self._end - 1}: {self._folder}; the longest operators:")
        for line in lines:
            logger.info(f"  {line}")


def _profiler(device: torch.device, folder: Path) -> Any:
    if device.type == "npu":
        import torch_npu

        kit = torch_npu.profiler
        activities = [kit.ProfilerActivity.CPU, kit.ProfilerActivity.NPU]
        return kit.profile(
            activities=activities,
            on_trace_ready=kit.tensorboard_trace_handler(str(folder)),
            experimental_config=kit._ExperimentalConfig(profiler_level=kit.ProfilerLevel.Level1),  # 0: no op_statistic
        )
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def _longest(profile: torch.profiler.profile, device: torch.device) -> list[str]:
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))[:LONGEST]
    return [f"{getattr(e, key) / 1e3:10.2f} ms  {e.count:6} calls  {e.key}" for e in events]


def longest_in_tables(folder: Path) -> list[str]:
    """The same from the `op_statistic.csv` that torch_npu's profiler writes below `folder`."""
    for table in sorted(folder.rglob("op_statistic.csv")):
        with open(table, newline="") as file:
            rows = list(csv.DictReader(file))
        rows.sort(key=lambda row: -float(row["Total Time(us)"]))
        return [
            f"{float(r['Total Time(us)']) / 1e3:10.2f} ms  {r['Count']:>6} calls  {r['OP Type']}"
            for r in rows[:LONGEST]
        ]
    return [f"no op_statistic.csv below {folder}: torch_npu's profiler has not analysed the trace"]
