"""Figures of an evaluation, and how they are shown: a table, a JSON report with the protocol spelled out."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """What a protocol's `score` returns. Shares are in [0, 1]; NaN where there was nothing to find."""

    values: Mapping[str, float]  # figure's name -> value, the most important first
    per_category: tuple[tuple[str, float], ...] = ()  # name, AP; names may repeat
    notes: tuple[str, ...] = ()  # what a reader of the figures must know, such as a data set that is missing
