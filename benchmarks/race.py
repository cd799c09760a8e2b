"""What the comparisons share: options, the sides' processes, their taking turns, and the table that comes of it."""

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from benchmarks import workload

ROOT = Path(__file__).parents[1]
Size = Literal["swin_t", "swin_b", "swin_l", "quickstart"]
BEST = 100  # boxes of an image that are compared
TABLE = "| | measured | target | |\n|---|---|---|---|"
TOLERANCE = 1e-4  # of a score, and of a box and its score: sum over the five numbers, all in [0, 1]
SHARE = 0.99  # of the boxes; rounding may choose another last query


@dataclass(frozen=True)
class Options:
    """Of a comparison on the CPU, as its command line has them.

    Args:
        size: of the model.
        height: of the image in pixels.
        width: of the image in pixels.
        rounds: the median is reported.
        threads: of torch.
    """

    size: Size = "swin_b"
    height: int = 800
    width: int = 1333
    rounds: int = 3
    threads: int = 2

    def heading(self, what: str) -> str:
        """A table's title and first two lines."""
        machine = f"torch {torch.__version__}, {self.threads} threads, random weights"
        return f"\n{self.size}, {what}, medians of {self.rounds} rounds ({machine})\n\n{TABLE}"


class Worker:
    """A running side; `call` waits for its answer."""

    def __init__(self, side: str, folder: Path, threads: int, environment: dict[str, str | None] | None = None) -> None:
        # Each side decides itself about these two, whatever this process has set. None: unset.
        unset = dict.fromkeys(("THP_MEM_ALLOC_ENABLE", "GOMP_SPINCOUNT"))
        wanted = os.environ | unset | {"OMP_NUM_THREADS": str(threads)} | (environment or {})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", side, str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={key: value for key, value in wanted.items() if value is not None},
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
def prepared(options: Options, *sides: str) -> Iterator[tuple[list[Worker], Path]]:
    """One process a side, all with the same weights, and the file of one image and one sentence to ask them about."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload.write_models(folder, options.size, with_transformers="transformers" in sides)
        captions = workload.sentences(1)
        inputs = workload.write_inputs(folder / "inputs.safetensors", captions, options.height, options.width)
        with workers(folder, options.threads, *sides) as started:
            yield started, inputs


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


def alternate(rounds: int, calls: Mapping[str, Callable[[], dict[str, float]]]) -> dict[str, Measured]:
    """Each call once a round, in turn, so that a slow minute of the machine meets all of them."""
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            answers[name].append(call())
    return {
        name: Measured(statistics.median(a["seconds"] for a in found), max(a["peak"] for a in found), tuple(found))
        for name, found in answers.items()
    }


def warm_up(ours: Worker, theirs: Worker, inputs: Path) -> str:
    """Let both predict once, and say how closely they agree."""
    results = [inputs.with_stem(f"answer_{number}") for number in range(2)]
    for worker, result in zip((ours, theirs), results, strict=True):
        worker.call("infer", inputs, result)
    return agreement(*results)


def agreement(ours: Path, theirs: Path) -> str:
    """How closely two result files agree, as sets; AssertionError where scores or boxes do not.

    Each of our best boxes must have one of theirs at its place and of its score, whatever its rank there: rounding
    swaps ranks.
    """
    results = [load_file(path) for path in (ours, theirs)]
    best = [result["scores"].sort(dim=1, descending=True) for result in results]
    apart = (best[0].values - best[1].values).abs().max().item()
    boxes = [torch.cat((result["boxes"], result["scores"][..., None]), dim=-1) for result in results]
    chosen = boxes[0].gather(1, best[0].indices[:, :BEST, None].expand(-1, -1, 5))
    share = (torch.cdist(chosen, boxes[1], p=1).amin(dim=2) < TOLERANCE).float().mean().item()
    found = f"sorted scores within {apart:.0e}; {share:.0%} of the best {BEST} boxes within {TOLERANCE} of theirs"
    assert apart < TOLERANCE and share >= SHARE, found
    return found


def row(name: str, measured: str, target: str = "", met: bool | None = None) -> str:
    """A table line; `met` is None where there is no target."""
    return f"| {name} | {measured} | {target} | {'' if met is None else 'met' if met else 'missed'} |"


def peer_name() -> str:
    """transformers and its version, for the tables."""
    return f"transformers {version('transformers')}"


def gib(mib: float) -> str:
    """For the tables."""
    return f"{mib / 1024:.2f} GiB"
