"""What a detector answered to one image's prompt: the record that every protocol's `score` reads."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]


@dataclass(frozen=True)
class ImageAnswer:
    """Ranked boxes of one image (or of one expression, where a protocol counts each as an image of its own)."""

    image_id: int  # as in the annotation file
    boxes: Floats  # (K, 4) xyxy in pixels of the original image
    scores: Floats  # (K,) falling
    labels: Integers  # (K,) index into the prompt: category in the file's order, phrase, or 0


def iou_matrix(boxes: Floats, targets: Floats) -> Floats:
    """(K, 4) and (N, 4), both xyxy -> (K, N) float64 intersection over union; 0 where both are empty."""
    boxes, targets = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(targets, np.float64).reshape(-1, 4)
    low = np.maximum(boxes[:, None, :2], targets[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], targets[None, :, 2:])
    overlap = np.maximum(high - low, 0.0).prod(axis=2)
    areas, target_areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1), (targets[:, 2:] - targets[:, :2]).prod(axis=1)
    union = areas[:, None] + target_areas[None] - overlap
    return np.asarray(overlap / np.maximum(union, np.finfo(np.float64).tiny))


def xywh_to_xyxy(boxes: object) -> Floats:
    """Boxes as COCO writes them, [x, y, width, height] -> (N, 4) float64 xyxy."""
    xywh = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
