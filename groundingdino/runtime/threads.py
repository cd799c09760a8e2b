"""torch's threads follow the cores that other programs leave free (Linux), where `devices.tune_process` starts it.

An operator that is split among threads ends when the last of them does. Where another program has taken a core, the
threads that are done wait for the one that has none, for a time slice or more in each of thousands of operators: with
two threads on two cores, one busy process makes a training step of a small model 27 times slower, and a step with one
thread hardly at all.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

INTERVAL = 0.5  # seconds between two looks: fifty of the kernel's ticks
FIXED = "OMP_NUM_THREADS"  # who has set it, torchrun too, has decided
STAT, QUOTA = Path("/proc/stat"), Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Usage:
    """Seconds, of the clock and of the processors that this process may use."""

    clock: float
    all: float  # spent by every program
    own: float  # spent by this process


def usage() -> Usage:
    """Of now, since the start of the system."""
    names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = 0
    for line in STAT.read_text().splitlines():
        name, *numbers = line.split()
        if name in names:
            user, nice, system, _idle, _waiting, *others = map(int, numbers[:8])
            ticks += user + nice + system + sum(others)
    return Usage(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time())


class ThreadGovernor:
    """Keeps torch's threads at `most`, less the cores that others use; at least one.

    Args:
        most: threads on an idle machine.
        look: the function to ask for the usage.
    """

    def __init__(self, most: int, look: Callable[[], Usage] = usage) -> None:
        self.most = self.threads = most
        self._look = look
        self._last = look()

    def adjust(self) -> None:
        """Look again, where `INTERVAL` has passed, and set the number of threads for the calling thread."""
        if time.monotonic() - self._last.clock >= INTERVAL:
            now = self._look()
            used = (now.all - self._last.all) - (now.own - self._last.own)
            self.threads = max(self.most - round(used / (now.clock - self._last.clock)), 1)
            self._last = now
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)


_governor: ThreadGovernor | None = None
_process = os.getpid()  # that imported this module; a forked one still has its parent's here


def follow_free_cores() -> None:
    """From now on, let `adjust` keep torch's threads at the number of free cores.

    Nothing happens where OMP_NUM_THREADS is set, where a second thread would have no core, and off Linux.
    """
    global _governor
    if FIXED not in os.environ and sys.platform == "linux" and STAT.exists():
        most = min(torch.get_num_threads(), allowed_cores())
        _governor = ThreadGovernor(most) if most > 1 else None


def adjust() -> None:
    """Called by the library before each step and each image. Does nothing before `follow_free_cores`.

    But a forked process gets one thread: OpenMP's others did not come along, and waiting for them would never end.
    """
    if os.getpid() != _process:
        if torch.get_num_threads() > 1:
            torch.set_num_threads(1)
    elif _governor is not None:
        _governor.adjust()


def allowed_cores() -> int:
    """Whole cores that the container's limit on processor time lets this process use; without a limit all."""
    try:
        quota, period = QUOTA.read_text().split()[:2]
    except OSError:
        return os.cpu_count() or 1
    return os.cpu_count() or 1 if quota == "max" else max(int(quota) // int(period), 1)
