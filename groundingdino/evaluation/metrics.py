"""Figures of merit for referring expressions, from ranked boxes. Boxes are xyxy in pixels of the original image."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from groundingdino.data.annotations import Expression

RANKS = (1, 5, 10)
HIT_IOU = 0.5
AP_DETECTIONS = 100  # boxes of an expression that count for the average precision
_AP_CHUNK = 500  # expressions handed to pycocotools at once: it wants a dict for each box


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
    from pycocotools.cocoeval import COCOeval

    ordered = sorted(answers, key=lambda answer: answer.index)
    evaluated: list[Any] = []
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports on every step
        for start in range(0, len(ordered), _AP_CHUNK):
            part = ordered[start : start + _AP_CHUNK]
            judge = COCOeval(_truth(expressions, part), None, "bbox")
            judge.cocoDt = judge.cocoGt.loadRes(_found(part))
            _set(judge.params, [answer.index for answer in part])
            judge.evaluate()
            evaluated += judge.evalImgs
        total = COCOeval(iouType="bbox")
        _set(total.params, [answer.index for answer in ordered])
        total._paramsEval, total.evalImgs = total.params, evaluated
        total.accumulate()
    values = total.eval["precision"]  # (IoU thresholds, recalls, 1, 1, 1); -1 where nothing is to be found
    return float(values[values > -1].mean())


def _set(params: Any, image_ids: list[int]) -> None:
    params.imgIds, params.catIds, params.useCats = image_ids, [1], 0
    params.areaRng, params.areaRngLbl, params.maxDets = [[0, 1e10]], ["all"], [AP_DETECTIONS]


def _truth(expressions: Sequence[Expression], answers: Sequence[Answer]) -> Any:
    from pycocotools.coco import COCO

    annotations = []
    for number, answer in enumerate(answers, start=1):
        x1, y1, x2, y2 = expressions[answer.index].box
        box, area = [x1, y1, x2 - x1, y2 - y1], (x2 - x1) * (y2 - y1)
        one = {"id": number, "image_id": answer.index, "category_id": 1, "bbox": box, "area": area, "iscrowd": 0}
        annotations.append(one)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": answer.index} for answer in answers],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }
    truth.createIndex()
    return truth


def _found(answers: Sequence[Answer]) -> np.ndarray:
    """(boxes of all, 7): image, x, y, width, height, score, category."""
    rows = []
    for answer in answers:
        boxes = answer.boxes[:AP_DETECTIONS].astype(np.float64)
        columns = (
            np.full((len(boxes), 1), answer.index),
            boxes[:, :2],
            boxes[:, 2:] - boxes[:, :2],
            answer.scores[:AP_DETECTIONS, None],
            np.ones((len(boxes), 1)),
        )
        rows.append(np.concatenate(columns, axis=1))
    return np.concatenate(rows)
