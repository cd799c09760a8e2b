"""The threshold of each name that maximises F1 on a small labelled set."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundingdino import boxes as box_ops
from groundingdino.structures import Detections

MATCH_IOU = 0.5  # of a box and the labelled one that it finds
POINTS = tuple(round(0.05 * step, 2) for step in range(1, 20))  # thresholds of a printed curve


@dataclass(frozen=True)
class Curve:
    """How well one name is found at every threshold."""

    name: str
    scores: NDArray[np.float32]  # (K,) of all its boxes, falling
    correct: NDArray[np.bool_]  # (K,)
    objects: int  # that are to be found

    def at(self, threshold: float) -> tuple[float, float, float]:
        """Precision, recall and F1 of the boxes that score at least `threshold`; 0 where there is none."""
        chosen = self.scores >= np.float32(threshold)
        hits = int(self.correct[chosen].sum())
        precision, recall = hits / max(1, int(chosen.sum())), hits / max(1, self.objects)
        return precision, recall, 2 * hits / max(1, int(chosen.sum()) + self.objects)

    def best(self) -> float | None:
        """The threshold of the highest F1, halfway to the next lower score; None where nothing is found rightly."""
        if not self.correct.any():
            return None
        counts = np.arange(1, len(self.scores) + 1)
        f1 = 2 * self.correct.cumsum() / (counts + self.objects)
        f1[:-1][self.scores[:-1] == self.scores[1:]] = -1  # equal scores pass together
        place = int(f1.argmax())
        below = float(self.scores[place + 1]) if place + 1 < len(self.scores) else 0.0
        return round((float(self.scores[place]) + below) / 2, 4)

    def lines(self) -> Iterator[str]:
        """A table of the curve."""
        yield f"{self.name}: {self.objects} objects, {len(self.scores)} boxes"
        for threshold in POINTS:
            precision, recall, f1 = self.at(threshold)
            figures = f"precision {precision:6.1%}  recall {recall:6.1%}  F1 {f1:6.1%}"
            yield f"  {threshold:.2f}  {figures}  {'#' * round(40 * f1)}".rstrip()


def curves(names: Iterable[str], images: Iterable[tuple[Mapping[str, Tensor], Detections]]) -> list[Curve]:
    """The curve of each name.

    Args:
        images: of each image the labelled boxes (N, 4) xyxy by name, and what was found, best first.
    """
    scores: dict[str, list[float]] = {name: [] for name in names}
    correct: dict[str, list[bool]] = {name: [] for name in scores}
    objects = dict.fromkeys(scores, 0)
    for truth, found in images:
        for name in scores:
            boxes = truth.get(name, torch.zeros(0, 4))
            objects[name] += len(boxes)
            rows = [row for row, other in enumerate(found.names) if other == name]
            scores[name] += found.scores[rows].tolist()
            correct[name] += _matched(found.boxes[rows], boxes)
    result = []
    for name in scores:
        values, hits = np.array(scores[name], np.float32), np.array(correct[name], bool)
        order = np.argsort(-values, kind="stable")
        result.append(Curve(name, values[order], hits[order], objects[name]))
    return result


def _matched(boxes: Tensor, truth: Tensor) -> list[bool]:
    """Whether each box, best first, finds an object that no better one has found."""
    overlaps = box_ops.iou(boxes[:, None], truth[None])  # (K, N)
    result = []
    for row in overlaps:
        best = int(row.argmax()) if len(row) else -1
        hit = best >= 0 and float(row[best]) >= MATCH_IOU
        if hit:
            overlaps[:, best] = -1
        result.append(hit)
    return result
