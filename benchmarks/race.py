"""Starting the sides' processes, letting them take turns, and the table that comes of it."""

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
BEST = 100  # boxes of an image that are compared
SCORE_TOLERANCE = 1e-4
BOX_TOLERANCE = 1e-3  # sum over the four numbers, in [0, 1]


class Worker:
    """A running side; `call` waits for its answer."""

    def __init__(self, side: str, folder: Path, threads: int, environment: dict[str, str] | None = None) -> None:
        # Each side decides itself about THP_MEM_ALLOC_ENABLE, which importing groundingdino has set here.
        inherited = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", side, str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=inherited | {"OMP_NUM_THREADS": str(threads)} | (environment or {}),
        )

    def send(self, call: str, inputs: Path | None = None, result: Path | None = None, **arguments: Any) -> None:
        """Ask without waiting."""
        files = {"inputs": inputs and str(inputs), "result": result and str(result)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"call": call, **files, **arguments}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, float]:
        """Wait for it. RuntimeError where the process has ended; its message is on the terminal."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with status {self.process.wait()}")
        return json.loads(line)

    def call(self, call: str, inputs: Path | None = None, result: Path | None = None, **arguments: Any) -> dict:
        """Ask and wait."""
        self.send(call, inputs, result, **arguments)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def workers(folder: Path, threads: int, *sides: str) -> Iterator[list[Worker]]:
    """One process a side."""
    with contextlib.ExitStack() as stack:
        yield [_started(stack, Worker(side, folder, threads)) for side in sides]


@contextlib.contextmanager
def ranks(folder: Path, threads: int, count: int) -> Iterator[list[Worker]]:
    """Processes of ours that train together, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with contextlib.ExitStack() as stack:
        yield [
            _started(stack, Worker("ours", folder, threads, {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }))
            for rank in range(count)
        ]  # fmt: skip


def _started(stack: contextlib.ExitStack, worker: Worker) -> Worker:
    stack.callback(worker.close)
    return worker


@dataclass(frozen=True)
class Measured:
    """Of several rounds."""

    seconds: float  # median
    peak: float  # MiB, largest
    answers: tuple[dict[str, float], ...]

    def median(self, name: str) -> float:
        """Of another number in the answers."""
        return statistics.median(answer[name] for answer in self.answers)


def alternate(rounds: int, calls: dict[str, Callable[[], dict[str, float]]]) -> dict[str, Measured]:
    """Each call once a round, in turn, so that a slow minute of the machine meets all of them."""
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            answers[name].append(call())
    return {
        name: Measured(statistics.median(a["seconds"] for a in found), max(a["peak"] for a in found), tuple(found))
        for name, found in answers.items()
    }


def agreement(ours: Path, theirs: Path) -> str:
    """How closely two result files agree, as sets; AssertionError where the scores do not.

    Boxes are reported, not asserted: random weights rank many proposals almost equally, and rounding chooses others.
    """
    results = [load_file(path) for path in (ours, theirs)]
    best = [r["scores"].sort(dim=1, descending=True) for r in results]
    apart = (best[0].values - best[1].values).abs().max().item()
    chosen = results[0]["boxes"].gather(1, best[0].indices[:, :BEST, None].expand(-1, -1, 4))
    distance = torch.cdist(chosen, results[1]["boxes"], p=1).amin(dim=2)
    share = (distance < BOX_TOLERANCE).float().mean().item()
    assert apart < SCORE_TOLERANCE, apart
    boxes = f"{share:.0%} of the best {BEST} boxes within {BOX_TOLERANCE} of one of theirs"
    return f"sorted scores within {apart:.0e}; {boxes}"


def heading(what: str, threads: int) -> str:
    """A table's title and first two lines."""
    machine = f"torch {torch.__version__}, {threads} threads, float32, random weights"
    return f"\n{what} ({machine})\n\n| | measured | target | |\n|---|---|---|---|"


def row(name: str, measured: str, target: str = "", met: bool | None = None) -> str:
    """A table line; `met` is None where there is no target."""
    return f"| {name} | {measured} | {target} | {'' if met is None else 'met' if met else 'missed'} |"


def gib(mib: float) -> str:
    """For the tables."""
    return f"{mib / 1024:.2f} GiB"
