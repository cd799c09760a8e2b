"""Calls a second alone and beside busy processes: ours, as its programs run, and transformers.

python -m benchmarks contention [--size quickstart] [--busy 1] [--seconds 6]

A call is a training step (forward, loss, backward) with several images, one predicted image, or two expressions that
the evaluator asks of one. Both sides may use `threads` threads; neither has OMP_NUM_THREADS, with which ours would not
adapt.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks import race, workload
from benchmarks.race import Worker, peer_name

SLOWER = 2.2  # at most, beside one busy process
SETTLE = 1.5  # seconds before a measurement
SPIN = "while True: pass"


@dataclass(frozen=True)
class Options(race.Options):
    """As the other comparisons', with

    Args:
        busy: processes that compute beside.
        seconds: of each measurement.
        images: of a training step.
        sides: whose calls are counted.
    """

    size: race.Size = "quickstart"
    height: int = 96
    width: int = 96
    rounds: int = 1
    busy: int = 1
    seconds: float = 6.0
    images: int = 8
    sides: tuple[str, ...] = ("ours", "transformers")


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many run meanwhile."""
    running = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def rate(call: Callable[[], object], seconds: float) -> float:
    """Calls a second, after some that are not counted."""
    begin = time.perf_counter()
    call()
    while time.perf_counter() - begin < SETTLE:
        call()
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        call()
        count += 1
    return count / (time.perf_counter() - begin)


def calls_of(side: str, worker: Worker, batch: Path, single: Path) -> dict[str, Callable[[], object]]:
    """What is counted, by name."""
    captions = workload.sentences(2)
    predict = {"ours": "predict", "transformers": "infer"}[side]

    def evaluate() -> None:
        if side == "ours":
            worker.call("sentences", single, captions=captions, batch_size=1)
        else:
            for _ in captions:
                worker.call("infer", single)

    return {
        "train": lambda: worker.call("train", batch, checkpointing=False),
        "predict": lambda: worker.call(predict, single),
        "evaluate": evaluate,
    }


def measure(options: Options, side: str, folder: Path) -> dict[str, tuple[float, float]]:
    """Calls a second alone and beside, of one side; the other is not there, as its threads would be busy too."""
    single = workload.write_inputs(folder / "single.safetensors", workload.sentences(1), options.height, options.width)
    captions = workload.sentences(options.images)
    batch = workload.write_inputs(folder / "batch.safetensors", captions, options.height, options.width)
    worker = Worker(side, folder, options.threads, {"OMP_NUM_THREADS": None})
    try:
        found: dict[str, list[tuple[float, float]]] = {}
        for name, call in calls_of(side, worker, batch, single).items():
            for _ in range(options.rounds):
                alone = rate(call, options.seconds)
                with busy_processes(options.busy):
                    found.setdefault(name, []).append((alone, rate(call, options.seconds)))
    finally:
        worker.close()
    return {name: sorted(pairs)[len(pairs) // 2] for name, pairs in found.items()}


def main(options: Options) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        workload.write_models(Path(name), options.size, "transformers" in options.sides)
        found = {side: measure(options, side, Path(name)) for side in options.sides}
    print(f"\n{options.size}, {options.height}x{options.width}, {options.threads} threads, calls a second\n")
    print(f"| | alone | beside {options.busy} busy | times slower | target | |\n|---|---|---|---|---|---|")
    for side, rates in found.items():
        for what, (alone, beside) in rates.items():
            name, slower = {"ours": "ours", "transformers": peer_name()}[side], alone / beside
            target = f" {SLOWER} | {'met' if slower <= SLOWER else 'missed'}" if side == "ours" else " | "
            print(f"| {what}: {name} | {alone:.2f} | {beside:.2f} | {slower:.2f} |{target} |")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
