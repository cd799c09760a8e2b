"""What a run records: a line per step in `metrics.jsonl`, and a plot of the curves; see `loggers` for other programs.

Losses stay on the device until `log_every` steps have gathered, and then travel in one copy.
"""

import contextlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundingdino.runtime import distributed
from groundingdino.runtime.files import atomic_file
from groundingdino.training.run_folder import RunFolder
from groundingdino.training.step_clock import StepMarks

PLOTTED = ("precision@", "AP", "F1_score", "N_acc")  # beginnings of figures' names


@dataclass(frozen=True)
class StepValues:
    """One optimizer step as the host knows it."""

    step: int  # 1 = the first
    epoch: int  # 0 = the first
    lr: float
    images: int  # over all processes
    terms: dict[str, float]  # averaged over micro-batches and processes; `loss` is their sum
    own_loss: float  # this process's own
    grad_norm: float  # before clipping
    samples: tuple[Any, ...]  # SampleInfo of this process's images
    seconds: dict[str, float] = field(default_factory=dict)  # of this process: data, forward, backward, ...


class DeferredSteps:
    """The losses of the last steps, kept on the device and read all at once."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._plain: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._marks: list[StepMarks] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, terms: dict[str, Tensor], grad_norm: Tensor, marks: StepMarks, **plain: Any) -> None:
        """Keep the values of a step: scalars on the device, and `step`, `epoch`, `lr`, `images`, `samples`."""
        self._names = list(terms)
        self._marks.append(marks)
        self._rows.append(torch.stack([*terms.values(), grad_norm.to(terms["loss"].dtype)]).detach())
        self._plain.append(plain)

    def read(self) -> list[StepValues]:
        """The steps since the last call, after one copy to the host and one exchange between the processes there."""
        if not self._rows:
            return []
        own = torch.stack(self._rows).cpu()  # (steps, terms + 1)
        mean = distributed.all_reduce_sum(own) / distributed.world_size()
        values = torch.stack([mean, own]).tolist()
        column = self._names.index("loss")
        steps = [
            StepValues(
                terms=dict(zip(self._names, mean_row, strict=False)),
                own_loss=own_row[column],
                grad_norm=own_row[-1],
                seconds=marks.seconds(),
                **plain,
            )
            for mean_row, own_row, plain, marks in zip(*values, self._plain, self._marks, strict=True)
        ]
        self._rows, self._plain, self._marks = [], [], []
        return steps


class MetricsLog:
    """`metrics.jsonl` of a run, written by the main process alone."""

    def __init__(self, folder: RunFolder, first_step: int) -> None:
        """`first_step`: the number of steps already taken; lines of later steps, left by a killed run, are removed."""
        _drop_lines_after(folder.metrics, first_step)
        self._file = open(folder.metrics, "a")
        self._time = time.perf_counter()

    def steps(self, steps: Sequence[StepValues]) -> float:
        """Record steps that were read together. Returns the images per second since the last call."""
        now = time.perf_counter()
        speed = sum(s.images for s in steps) / max(now - self._time, 1e-9)
        self._time = now
        for s in steps:
            row = {"step": s.step, "epoch": s.epoch, **s.terms, "lr": s.lr, "grad_norm": s.grad_norm}
            self._write({**row, "images_per_second": round(speed, 4), "seconds": s.seconds})
        return speed

    def evaluation(self, step: int, epoch: int, figures: dict[str, dict[str, float]]) -> None:
        """Record one evaluation: split -> figure -> value."""
        self._write({"step": step, "epoch": epoch, "evaluation": figures})

    def skip_time(self) -> None:
        """Leave the time since the last call out of the speed (an evaluation, a checkpoint)."""
        self._time = time.perf_counter()

    def _write(self, row: dict[str, Any]) -> None:
        row = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, f"could not write {self._file.name} ({error.strerror})") from error

    def close(self) -> None:
        """Flush everything to disk."""
        with contextlib.suppress(OSError):  # of what was written before: it has been said
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, without a last line that was cut off by a kill."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep what is settled up to `step`: its evaluation is done again, so that line goes too."""
    if not path.exists():
        return
    kept = [r for r in read_metrics(path) if r["step"] < step or (r["step"] == step and "evaluation" not in r)]
    with atomic_file(path) as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in kept)


def plot_curves(folder: RunFolder) -> Path | None:
    """Plot losses, Precision@k and AP over the steps of `metrics.jsonl` into `curves.png`. None without any step."""
    from matplotlib.figure import Figure  # slow to import, needed once

    rows = read_metrics(folder.metrics)
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "evaluation" in row]
    if not steps:
        return None
    figure = Figure(figsize=(12, 4.5), layout="constrained")  # without pyplot: no backend, no global state
    left, right = figure.subplots(1, 2)
    for name in ("loss", "loss_cls", "loss_bbox", "loss_iou"):
        if name in steps[0]:
            values = [math.nan if r[name] is None else r[name] for r in steps]
            left.plot([r["step"] for r in steps], values, label=name, linewidth=1)
    left.set(xlabel="step", ylabel="loss", yscale="log", title="training")
    left.legend()
    for split in evaluations[0]["evaluation"] if evaluations else ():
        for name, value in evaluations[0]["evaluation"][split].items():
            if isinstance(value, float) and name.startswith(PLOTTED):
                points = [(r["step"], r["evaluation"].get(split, {}).get(name)) for r in evaluations]
                right.plot(*zip(*points, strict=True), marker="o", label=f"{split} {name}")
    right.set(xlabel="step", ylim=(0, 1), title="evaluation")
    if right.lines:
        right.legend(fontsize="small")
    figure.savefig(folder.curves, dpi=110)
    return folder.curves
