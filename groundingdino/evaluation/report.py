"""Figures of an evaluation, and how they are shown: a table, a JSON report, two reports side by side."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundingdino.data.formats import files


@dataclass(frozen=True)
class Figures:
    """What a protocol's `score` returns. Shares are in [0, 1]; NaN where there was nothing to find."""

    values: Mapping[str, float]  # figure's name -> value, the most important first
    per_category: tuple[tuple[str, float], ...] = ()  # name, AP; names may repeat
    notes: tuple[str, ...] = ()  # what a reader of the figures must know, such as a data set that is missing

    def report(self) -> dict[str, Any]:
        """Plain data for a JSON file, null for NaN."""
        return {
            "figures": {name: _or_none(value) for name, value in self.values.items()},
            "per_category": [[name, _or_none(value)] for name, value in self.per_category],
            "notes": list(self.notes),
        }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def table(values: Mapping[str, float | None], published: Mapping[str, float] | None = None) -> list[str]:
    """A line for each figure, in percent, with the published one (which is in percent already) beside it."""
    width = max(map(len, values), default=0) + 2
    lines = [f"{'':{width}}{'measured':>10}{'published':>11}"] if published else [f"{'':{width}}{'measured':>10}"]
    for name, value in values.items():
        line = f"{name:{width}}{_percent(value):>10}"
        if published and name in published:
            line += f"{published[name]:>11.1f}"
        lines.append(line)
    return lines


def category_table(per_category: Iterable[Sequence[Any]], columns: int = 3) -> list[str]:
    """AP of each category in percent, the best first, in columns; those without an object are left out."""
    rows = sorted(((name, value) for name, value in per_category if value is not None), key=lambda row: -row[1])
    cells = [f"{name[:28]:28}{_percent(value):>8}" for name, value in rows]
    height = -(-len(cells) // columns)
    return ["   ".join(cells[line::height]) for line in range(height)]


def read_report(path: Path) -> dict[str, Any]:
    """A report that `evaluate` wrote. ValueError, naming the file, if it is something else."""
    content = files.read_json(path, dict)
    if not isinstance(content.get("figures"), dict):
        raise ValueError(f"{path}: not a report of an evaluation, which has an object of figures")
    return content


def comparison(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[str]:
    """Reports before and after a fine-tune in one table: each figure in percent, and how much it changed.

    Raises:
        ValueError: if a report has no partner of the same protocol and split.
    """
    partners = {(report["protocol_name"], report["split"]): report for report in after}
    lines = [f"{'':44}{'before':>9}{'after':>9}{'change':>9}"]
    for report in before:
        key = (report["protocol_name"], report["split"])
        if key not in partners:
            raise ValueError(f"{' '.join(key)} was evaluated before only: evaluate it after, too")
        partner = partners.pop(key)
        if report["protocol"] != partner["protocol"]:
            different = [
                name for name in report["protocol"] if report["protocol"][name] != partner["protocol"].get(name)
            ]
            lines.append(f"{' '.join(key)}: NOT measured alike, see {', '.join(different)} in the reports")
        for name, old in report["figures"].items():
            new = partner["figures"].get(name)
            change = "" if old is None or new is None else f"{100 * (new - old):+.2f}"
            lines.append(f"{f'{key[0]} {key[1]}, {name}':44}{_percent(old):>9}{_percent(new):>9}{change:>9}")
    if partners:
        raise ValueError(f"{' '.join(next(iter(partners)))} was evaluated after only: evaluate it before, too")
    return lines


def mixture_table(mixtures: Mapping[float, Mapping[str, float | None]], names: Sequence[str]) -> list[str]:
    """A line for each alpha with some of its figures in percent."""
    width = max(10, *(len(name) + 2 for name in names))
    lines = [f"{'alpha':>6}" + "".join(f"{name:>{width}}" for name in names)]
    for alpha, figures in mixtures.items():
        lines.append(f"{alpha:6g}" + "".join(f"{_percent(figures[name]):>{width}}" for name in names))
    return lines


def plot_mixtures(mixtures: Mapping[float, Mapping[str, float | None]], path: Path) -> Path:
    """Draw the first figure over alpha. Returns `path`."""
    from matplotlib.figure import Figure  # slow to import

    name = next(iter(next(iter(mixtures.values()))))
    figure = Figure(figsize=(6, 4.5), layout="constrained")  # without pyplot: no backend, no global state
    axes = figure.subplots()
    found = [row[name] for row in mixtures.values()]
    axes.plot(list(mixtures), [math.nan if value is None else 100 * value for value in found], marker="o")
    axes.set(xlabel="alpha: share of the fine-tuned weights", ylabel=f"{name} in percent")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return path


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"
