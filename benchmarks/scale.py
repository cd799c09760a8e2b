"""How seconds and memory grow, each as a table and a small plot.

python -m benchmarks scale [--what size tokens batch sentences ranks] [--model swin_b] [--plots docs] [--threads 2]
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from benchmarks import workload
from benchmarks.race import Size, Worker, alternate, gib, ranks, workers

Growth = Literal["size", "tokens", "batch", "sentences", "ranks"]
Points = dict[int, tuple[float, float]]  # x -> seconds, peak in MiB
RATIO = 5 / 3  # long to short side, as 1333 to 800
LABELS: dict[Growth, str] = {
    "size": "longer side of the image, pixels (one sentence)",
    "tokens": "text tokens",
    "batch": "images in a batch",
    "sentences": "sentences about one photograph",
    "ranks": "ranks, one thread and one image each (training step)",
}
VALUES: dict[Growth, tuple[int, ...]] = {
    "size": (480, 640, 800, 1066, 1333),
    "tokens": (8, 32, 64, 128, 256),
    "batch": (1, 2, 4),
    "sentences": (1, 2, 4, 8, 16),
    "ranks": (1, 2),
}


def inputs_for(what: Growth, value: int, folder: Path, long: int) -> Path:
    """The input file of one point."""
    long = value if what == "size" else long
    captions = workload.sentences(value if what == "batch" else 1)
    if what == "tokens":
        captions = [workload.sentence_of(value)]
    return workload.write_inputs(folder / f"{what}_{value}.safetensors", captions, round(long / RATIO), long)


def timed(rounds: int, call: Callable[[], dict[str, float]]) -> tuple[float, float]:
    """Seconds and peak in MiB of a call, after one that is not counted."""
    call()
    found = alternate(rounds, {"call": call})["call"]
    return found.seconds, found.peak


def measure(what: Growth, values: tuple[int, ...], folder: Path, long: int, rounds: int, threads: int) -> Points:
    """Everything but ranks; each point in a process of its own, because a process stays as large as it once was."""
    points = {}
    for value in values:
        inputs = inputs_for(what, value, folder, long)
        with workers(folder, threads, "ours") as (ours,):
            call = partial(ours.call, "infer", inputs)
            if what == "sentences":
                call = partial(ours.call, "sentences", inputs, captions=workload.sentences(value), batch_size=4)
            points[value] = timed(rounds, call)
    return points


def measure_ranks(values: tuple[int, ...], folder: Path, long: int, rounds: int) -> Points:
    """A checkpointed training step of so many processes together, one thread each; the slowest and the largest."""
    inputs = inputs_for("ranks", 0, folder, long)
    points = {}
    for value in values:
        with ranks(folder, 1, value) as group:

            def step(group: list[Worker] = group) -> dict[str, float]:
                for worker in group:
                    worker.send("train", inputs, checkpointing=True)
                answers = [worker.answer() for worker in group]
                return {key: max(answer[key] for answer in answers) for key in ("seconds", "peak")}

            points[value] = timed(rounds, step)
    return points


def plot(points: Points, label: str, path: Path) -> None:
    """Seconds on the left axis, GiB on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(4, 2.6), layout="constrained")
    right = left.twinx()
    xs = list(points)
    left.plot(xs, [seconds for seconds, _ in points.values()], "o-", color="tab:blue")
    right.plot(xs, [peak / 1024 for _, peak in points.values()], "s--", color="tab:orange")
    left.set_xlabel(label, fontsize=8)
    left.set_ylabel("seconds", color="tab:blue")
    right.set_ylabel("GiB, peak", color="tab:orange")
    left.set_xticks(xs)
    left.set_ylim(bottom=0)
    right.set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main(
    what: tuple[Growth, ...] = ("size", "tokens", "batch", "sentences", "ranks"),
    model: Size = "swin_b",
    long: int = 853,
    plots: Path = Path("docs"),
    rounds: int = 2,
    threads: int = 2,
) -> None:
    """Measure ours on the CPU.

    Args:
        what: to vary.
        model: its size.
        long: longer side of the images where it is not varied, in pixels.
        plots: folder that they are written to.
        rounds: the median is reported.
        threads: of torch; the ranks have one each.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload.write_models(folder, model, with_transformers=False)
        for growth, points in _measured(what, folder, long, rounds, threads):
            print(f"\n| {LABELS[growth]} | seconds | peak |\n|---|---|---|")
            for x, (seconds, peak) in points.items():
                print(f"| {x} | {seconds:.2f} | {gib(peak)} |", flush=True)
            plot(points, LABELS[growth], plots / f"scale_{growth}.png")


def _measured(
    what: tuple[Growth, ...], folder: Path, long: int, rounds: int, threads: int
) -> Iterator[tuple[Growth, Points]]:
    for growth in what:
        if growth != "ranks":
            yield growth, measure(growth, VALUES[growth], folder, long, rounds, threads)
    if "ranks" in what:
        yield "ranks", measure_ranks(VALUES["ranks"], folder, long, rounds)


if __name__ == "__main__":
    tyro.cli(main)
