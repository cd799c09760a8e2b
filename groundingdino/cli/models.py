"""List the released checkpoints: names that can stand for a file, what they were trained on, what was published.

groundingdino models
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from groundingdino.checkpoints import zoo
from groundingdino.cli import console

SHOWN = ("coco val2017", "lvis minival", "refcoco val")


@dataclass(frozen=True)
class Arguments:
    """In which form."""

    json: bool = False
    """everything that is known, as JSON"""
    all: bool = False
    """also models of which only figures were published"""


def records() -> list[dict[str, Any]]:
    """All that is known of each release, and whether it is in the cache."""
    from groundingdino.checkpoints.hub import is_cached

    return [
        {**asdict(release), "file": release.file, "cached": is_cached(release), "published": release.published}
        for release in zoo.RELEASES
    ]


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line a release: name, size, whether it is cached, the first number of some benchmarks, training data."""
    lines = [f"{'name':24}{'size':8}{'cached':8}{'COCO':>6}{'LVIS':>6}{'RefCOCO':>9}  trained on"]
    for row in rows:
        figures = [zoo.published(row["title"], benchmark) for benchmark in SHOWN]
        coco, lvis, refcoco = (f"{numbers[0]:.1f}" if numbers else "-" for numbers in figures)
        cached = "yes" if row["cached"] else "no" if row["url"] else "-"
        lines.append(f"{row['name']:24}{row['preset']:8}{cached:8}{coco:>6}{lvis:>6}{refcoco:>9}  {row['trained_on']}")
    return [
        *lines,
        "COCO val2017 AP, LVIS minival fixed AP, RefCOCO val Precision@1 in percent, as published; more: --json",
    ]


def show(arguments: Arguments) -> int:
    """Print the releases. The exit code."""
    rows = [row for row in records() if row["url"] or arguments.all]
    print(json.dumps(rows, indent=1) if arguments.json else "\n".join(table(rows)))
    return 0


def main(arguments: Sequence[str], prog: str = "groundingdino models") -> int:
    """The exit code."""
    return console.run(prog, lambda: show(console.parse(Arguments, arguments, prog, description=__doc__)))
