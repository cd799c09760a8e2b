"""Generalised referring expressions (gRefCOCO): none, one or several objects for each expression."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from groundingdino.evaluation.answers import Floats, ImageAnswer, iou_matrix, xywh_to_xyxy
from groundingdino.evaluation.report import Figures

SCORE_THRESHOLD = 0.7
HIT_IOU = 0.5
NO_TARGET = -1  # category of the annotation of an expression that describes nothing


@dataclass(frozen=True)
class GrefcocoTruth:
    """Image id (each expression is one) -> its boxes, (N, 4) xyxy; no row where nothing is described."""

    boxes: Mapping[int, Floats]

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "GrefcocoTruth":
        """Of an MDETR-style file; an expression that describes nothing has one annotation of category -1."""
        boxes: dict[int, list[Any]] = {image["id"]: [] for image in document["images"]}
        for annotation in document["annotations"]:
            if annotation["category_id"] != NO_TARGET:
                boxes[annotation["image_id"]].append(annotation["bbox"])
        return cls({image_id: xywh_to_xyxy(rows) for image_id, rows in boxes.items()})


def score(truth: GrefcocoTruth, answers: Iterable[ImageAnswer], threshold: float = SCORE_THRESHOLD) -> Figures:
    """F1_score, T_acc and N_acc as in mmdet `evaluation/metrics/grefcoco_metric.py`.

    F1_score is the share of expressions with F1 = 1: boxes of at least `threshold` match the targets one to one at IoU
    0.5. T_acc is the share of expressions with a target for which any box is kept, N_acc the share without one for
    which none is. The published table's Pr@(F1=1) and N-acc are F1_score and N_acc.
    """
    perfect = kept_with_target = with_target = empty_without_target = without_target = 0
    for answer in answers:
        targets = truth.boxes[answer.image_id]
        # The comparison is in the scores' own precision, as in mmdet.
        kept = answer.boxes[answer.scores >= threshold]
        if len(targets):
            with_target += 1
            kept_with_target += len(kept) > 0
            perfect += len(kept) == len(targets) and greedy_matches(iou_matrix(kept, targets)) == len(targets)
        else:
            without_target += 1
            empty_without_target += len(kept) == 0
            perfect += len(kept) == 0
    total = with_target + without_target
    return Figures({
        "F1_score": _share(perfect, total),
        "T_acc": _share(kept_with_target, with_target),
        "N_acc": _share(empty_without_target, without_target),
    })  # fmt: skip


def greedy_matches(overlaps: Floats) -> int:
    """How many boxes match a target at IoU 0.5, the largest IoU first; (K, N) -> count."""
    overlaps = overlaps.copy()
    count = 0
    while overlaps.size and overlaps.max() >= HIT_IOU:
        box, target = np.unravel_index(overlaps.argmax(), overlaps.shape)
        overlaps[box, :], overlaps[:, target] = 0, 0
        count += 1
    return count


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
