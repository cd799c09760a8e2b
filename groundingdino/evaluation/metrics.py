"""Figures of merit for referring expressions, from ranked boxes. Boxes are xyxy in pixels of the original image.

An answer's `image_id` is the index of its expression among those evaluated.
"""

from collections.abc import Sequence

import numpy as np
import torch

from groundingdino import boxes as box_ops
from groundingdino.data.annotations import ReferringExpression
from groundingdino.evaluation import coco
from groundingdino.evaluation.answers import Floats, ImageAnswer

RANKS = (1, 5, 10)
HIT_IOU = 0.5
AP_DETECTIONS = 100  # boxes of an expression that count for the average precision


def iou_with(boxes: Floats, target: Sequence[float]) -> Floats:
    """IoU (K,) of boxes (K, 4) with one box, in float32 as in mmdet `evaluation/functional/bbox_overlaps.py`."""
    found = torch.from_numpy(np.array(boxes, dtype=np.float32)).reshape(-1, 4)  # a copy: torch wants it writable
    return np.asarray(box_ops.iou(found, torch.tensor([float(side) for side in target])))


def precision(
    expressions: Sequence[ReferringExpression], answers: Sequence[ImageAnswer], ranks: Sequence[int] = RANKS
) -> dict[str, dict[int, float]]:
    """Data set -> rank k -> share of its expressions with a box of IoU >= 0.5 among the first k.

    mmdet `evaluation/metrics/refexp_metric.py`.
    """
    hits: dict[str, list[list[bool]]] = {}
    for answer in answers:
        expression = expressions[answer.image_id]
        good = iou_with(answer.boxes, expression.box) >= HIT_IOU
        hits.setdefault(expression.dataset_name, []).append([bool(good[:k].any()) for k in ranks])
    shares = {name: np.mean(rows, axis=0).tolist() for name, rows in hits.items()}
    return {name: dict(zip(ranks, share, strict=True)) for name, share in shares.items()}


def average_precision(expressions: Sequence[ReferringExpression], answers: Sequence[ImageAnswer]) -> float:
    """COCO's AP at IoU 0.5 to 0.95, in which each expression is an image of its own with one object of one class.

    It asks more than Precision@k: scores must be comparable between expressions, and boxes exact.
    """
    annotations = []
    for number, answer in enumerate(answers, start=1):
        x1, y1, x2, y2 = expressions[answer.image_id].box
        annotations.append(
            {"id": number, "image_id": answer.image_id, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        )
    images, categories = [{"id": answer.image_id} for answer in answers], [{"id": 1, "name": "object"}]
    truth = coco.CocoTruth.from_document({"images": images, "annotations": annotations, "categories": categories})
    values, _ = coco.precision_and_recall(truth, answers, [AP_DETECTIONS], areas=["all"])
    return float(values[values > -1].mean())
