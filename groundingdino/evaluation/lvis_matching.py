"""Precision and recall of one category by LVIS's rules: boxes are matched per image, then ranked over all images.

Axes: D boxes of one image and category, N its objects, A areas, T IoU thresholds, K all boxes of the category.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from groundingdino.evaluation.answers import Floats, Integers, iou_matrix

Mask = NDArray[np.bool_]
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
AREA_RANGES = np.array(list(AREAS.values()))  # (A, 2) square pixels, both ends inside
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # (T,)
RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class ImageCategory:
    """The objects of one category in one image."""

    category: int
    image: int
    boxes: Floats  # (N, 4) xyxy
    areas: Floats  # (N,) of the masks, square pixels
    ignored: Mask  # (N,)


@dataclass(frozen=True)
class Detections:
    """Boxes as columns, 28 bytes each."""

    categories: Integers  # (K,) int32
    images: Integers  # (K,) int32
    boxes: Floats  # (K, 4) float32 xyxy
    scores: Floats  # (K,) float32

    @classmethod
    def of(cls, categories: Integers, images: Integers, boxes: Floats, scores: Floats) -> "Detections":
        """The columns in their types."""
        four = np.asarray(boxes, np.float32).reshape(-1, 4)
        return cls(categories.astype(np.int32), images.astype(np.int32), four, scores.astype(np.float32))

    @classmethod
    def none(cls) -> "Detections":
        """No box."""
        return cls.of(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4)), np.zeros(0))

    @classmethod
    def concatenate(cls, parts: Sequence["Detections"]) -> "Detections":
        """All rows of the parts."""
        parts = [cls.none(), *parts]
        columns = ([getattr(part, name) for part in parts] for name in ("categories", "images", "boxes", "scores"))
        return cls(*map(np.concatenate, columns))

    def where(self, rows: Mask | Integers) -> "Detections":
        """Some rows."""
        return Detections(self.categories[rows], self.images[rows], self.boxes[rows], self.scores[rows])


def precision_and_recall(
    objects: Sequence[ImageCategory], found: Detections, not_exhaustive: Mask
) -> tuple[Floats, Floats]:
    """Precision (A, T, 101 recalls) and recall (A, T) of a category; NaN for an area in which it has no object.

    Args:
        objects: of the category, an entry for each image that holds any.
        found: boxes of the category in the images that say something about it.
        not_exhaustive: (I,) images in which a box that matches nothing is no mistake.
    """
    found = found.where(np.lexsort((-found.scores, found.images)))  # by image, then by score
    areas = (found.boxes[:, 2:].astype(np.float64) - found.boxes[:, :2]).prod(axis=1)
    outside = (areas < AREA_RANGES[:, :1]) | (areas > AREA_RANGES[:, 1:])  # (A, K)
    matched = np.zeros((len(AREA_RANGES), len(IOU_THRESHOLDS), len(areas)), bool)
    # A box that matches nothing does not count where it is out of the area range or the image is not exhaustive.
    ignored = np.repeat((outside | not_exhaustive[found.images])[:, None], len(IOU_THRESHOLDS), axis=1)
    counted = np.zeros(len(AREA_RANGES), np.int64)  # objects to be found
    for here in objects:
        begin, end = np.searchsorted(found.images, [here.image, here.image + 1])
        object_ignored = here.ignored | (here.areas < AREA_RANGES[:, :1]) | (here.areas > AREA_RANGES[:, 1:])  # (A, N)
        counted += (~object_ignored).sum(axis=1)
        matches(found.boxes[begin:end], here.boxes, object_ignored, matched[..., begin:end], ignored[..., begin:end])
    ranked = np.lexsort((found.images, -found.scores))  # equal scores: by image id, then as answered
    return _curves(matched[..., ranked], ignored[..., ranked], counted)


def matches(boxes: Floats, objects: Floats, object_ignored: Mask, matched: Mask, ignored: Mask) -> None:
    """Fill in which boxes of one image (falling scores) match, and which of these match an ignored object.

    At each threshold a box takes the free object of largest IoU, of equal ones the last; an ignored object (A, N) only
    if no other will do. `matched` and `ignored` (A, T, D) are written at the boxes that match.
    """
    overlaps = iou_matrix(boxes, objects)  # (D, N)
    free = np.ones((*matched.shape[:2], len(objects)), bool)  # (A, T, N)
    # Few boxes reach the lowest threshold; the others match nothing.
    for box in np.flatnonzero((overlaps >= IOU_THRESHOLDS[0]).any(axis=1)):
        fits = free & (overlaps[box] >= IOU_THRESHOLDS[:, None])  # (A, T, N)
        counted = fits & ~object_ignored[:, None]
        fits = np.where(counted.any(axis=2, keepdims=True), counted, fits)
        # The last of the largest.
        taken = len(objects) - 1 - np.where(fits, overlaps[box], -1.0)[..., ::-1].argmax(axis=2)  # (A, T)
        area, threshold = np.nonzero(fits.any(axis=2))
        taken = taken[area, threshold]
        free[area, threshold, taken] = False
        matched[area, threshold, box] = True
        ignored[area, threshold, box] = object_ignored[area, taken]


def _curves(matched: Mask, ignored: Mask, counted: Integers) -> tuple[Floats, Floats]:
    """(A, T, K) in falling scores -> interpolated precision at `RECALLS` (A, T, 101), final recall (A, T)."""
    true = np.cumsum(matched & ~ignored, axis=2, dtype=np.float64)
    false = np.cumsum(~matched & ~ignored, axis=2, dtype=np.float64)
    shape = matched.shape[:2]
    precision, recall = np.full((*shape, len(RECALLS)), np.nan), np.full(shape, np.nan)
    for area in np.flatnonzero(counted):
        for threshold in range(shape[1]):
            hits = true[area, threshold]
            reached = hits / counted[area]
            exact = hits / (false[area, threshold] + hits + np.spacing(1))
            best_from_here = np.append(np.maximum.accumulate(exact[::-1])[::-1], 0.0)  # 0 where no box reaches
            precision[area, threshold] = best_from_here[np.searchsorted(reached, RECALLS)]
            recall[area, threshold] = reached[-1] if len(reached) else 0.0
    return precision, recall
