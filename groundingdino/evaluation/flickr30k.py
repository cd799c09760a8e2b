"""Phrase grounding on Flickr30k Entities: recall of the phrases of a caption."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from groundingdino.evaluation.answers import Floats, ImageAnswer, iou_matrix, xywh_to_xyxy
from groundingdino.evaluation.report import Figures

RANKS = (1, 5, 10)
HIT_IOU = 0.5


@dataclass(frozen=True)
class FlickrTruth:
    """Image id (each caption is one) -> the boxes of each of its phrases, (N, 4) xyxy with N >= 1."""

    boxes: Mapping[int, tuple[Floats, ...]]

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "FlickrTruth":
        """Of MDETR's `final_flickr_separateGT_*.json`: `phrase_ids` of a box, in rising order, number its phrases."""
        grouped: dict[int, dict[Any, list[Any]]] = {image["id"]: {} for image in document["images"]}
        for annotation in document["annotations"]:
            phrases = grouped[annotation["image_id"]]
            phrases.setdefault(annotation["phrase_ids"], []).append(annotation["bbox"])
        boxes = {i: tuple(xywh_to_xyxy(phrases[p]) for p in sorted(phrases)) for i, phrases in grouped.items()}
        return cls(boxes)


def score(truth: FlickrTruth, answers: Iterable[ImageAnswer]) -> Figures:
    """Recall at 1, 5 and 10 boxes of a phrase and its upper bound (all boxes), any-box and merged-box.

    Any-box counts a phrase as found where a box has IoU >= 0.5 with any of its boxes; merged-box takes the smallest box
    around all of them. mmdet `evaluation/metrics/flickr30k_metric.py`, whose merged path stops on a mistyped name.
    """
    hits: dict[str, list[list[bool]]] = {"any": [], "merged": []}
    for answer in answers:
        for phrase, targets in enumerate(truth.boxes[answer.image_id]):
            boxes = answer.boxes[answer.labels == phrase]
            merged = np.concatenate([targets[:, :2].min(axis=0), targets[:, 2:].max(axis=0)])[None]
            for way, goal in (("any", targets), ("merged", merged)):
                hit = iou_matrix(boxes, goal).max(axis=1) >= HIT_IOU
                hits[way].append([*(bool(hit[:rank].any()) for rank in RANKS), bool(hit.any())])
    values: dict[str, float] = {}
    for way, prefix in (("any", ""), ("merged", "merged ")):
        shares = np.mean(hits[way], axis=0) if hits[way] else np.full(len(RANKS) + 1, np.nan)
        names = [*(f"{prefix}R@{rank}" for rank in RANKS), f"{prefix}upper bound"]
        values |= dict(zip(names, shares.tolist(), strict=True))
    return Figures(values)
