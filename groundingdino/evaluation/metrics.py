"""Figures of merit for referring expressions, from ranked boxes. Boxes are xyxy in pixels of the original image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from groundingdino.data.annotations import Expression
from groundingdino.evaluation import coco
from groundingdino.evaluation.answers import ImageAnswer

RANKS = (1, 5, 10)
HIT_IOU = 0.5
AP_DETECTIONS = 100  # boxes of an expression that count for the average precision


@dataclass(frozen=True)
class Answer:
    """What the detector answered to one expression, best box first."""

    index: int  # of the expression among those evaluated
    boxes: np.ndarray  # (K, 4) float32
    scores: np.ndarray  # (K,) float32, falling


def iou_with(boxes: np.ndarray, target: Sequence[float]) -> np.ndarray:
    """(K, 4) and one box -> (K,) float32; mmdet `evaluation/functional/bbox_overlaps.py`."""
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    one = np.asarray(target, dtype=np.float32)
    low, high = np.maximum(boxes[:, :2], one[:2]), np.minimum(boxes[:, 2:], one[2:])
    side = np.maximum(high - low, np.float32(0))
    overlap = side[:, 0] * side[:, 1]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    area = (one[2] - one[0]) * (one[3] - one[1])
    return overlap / np.maximum(areas + area - overlap, np.float32(1e-6))


def precision(
    expressions: Sequence[Expression], answers: Sequence[Answer], ranks: Sequence[int] = RANKS
) -> dict[str, dict[int, float]]:
    """Data set -> rank k -> share of its expressions with a box of IoU >= 0.5 among the first k.

    mmdet `evaluation/metrics/refexp_metric.py`.
    """
    hits: dict[str, list[list[bool]]] = {}
    for answer in answers:
        expression = expressions[answer.index]
        good = iou_with(answer.boxes, expression.box) >= HIT_IOU
        hits.setdefault(expression.dataset_name, []).append([bool(good[:k].any()) for k in ranks])
    shares = {name: np.mean(rows, axis=0).tolist() for name, rows in hits.items()}
    return {name: dict(zip(ranks, share, strict=True)) for name, share in shares.items()}


def average_precision(expressions: Sequence[Expression], answers: Sequence[Answer]) -> float:
    """COCO's AP at IoU 0.5 to 0.95, in which each expression is an image of its own with one object of one class.

    It asks more than Precision@k: scores must be comparable between expressions, and boxes exact.
    """
    annotations = []
    for number, answer in enumerate(answers, start=1):
        x1, y1, x2, y2 = expressions[answer.index].box
        annotations.append(
            {"id": number, "image_id": answer.index, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        )
    images, categories = [{"id": answer.index} for answer in answers], [{"id": 1, "name": "object"}]
    truth = coco.CocoTruth.from_document({"images": images, "annotations": annotations, "categories": categories})
    ranked = (ImageAnswer(a.index, a.boxes, a.scores, np.zeros(len(a.scores), np.int64)) for a in answers)
    values, _ = coco.precision_and_recall(truth, ranked, [AP_DETECTIONS], areas=["all"])
    return float(values[values > -1].mean())
