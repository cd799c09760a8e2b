"""Phrase grounding on Flickr30k Entities: recall of the phrases of a caption."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from groundingdino.evaluation.annotation_file import ImageFile, image_file, read_document
from groundingdino.evaluation.answers import Floats, ImageAnswer, Integers, iou_matrix, xywh_to_xyxy
from groundingdino.evaluation.report import Figures
from groundingdino.evaluation.runner import Question
from groundingdino.inference.prompts import Spans

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


@dataclass(frozen=True)
class Flickr30k:
    """A Flickr30k Entities file; the captions of an image file are asked together."""

    truth: FlickrTruth
    captions: Mapping[ImageFile, tuple[tuple[int, Spans], ...]]  # image file -> (image id, caption with its phrases)

    @classmethod
    def load(cls, path: Path, images: Path) -> "Flickr30k":
        """Of MDETR's annotation file and the folder of its images.

        Raises:
            ValueError: if it is not such a file, or the boxes of a caption are of more phrases than it marks.
        """
        document = read_document(path, "images", "annotations")
        truth = FlickrTruth.from_document(document)
        captions: dict[ImageFile, tuple[tuple[int, Spans], ...]] = {}
        for image in document["images"]:
            number, phrases = image["id"], image["tokens_positive_eval"]
            if len(truth.boxes[number]) > len(phrases):
                raise ValueError(
                    f"{path}: image {number}: boxes of {len(truth.boxes[number])} phrases, {len(phrases)} marked"
                )
            if phrases:
                file = image_file(images, image, path)
                captions[file] = (*captions.get(file, ()), (number, Spans(image["caption"], phrases)))
        return cls(truth, captions)

    def questions(self) -> Sequence[Question]:
        """Each image file with its captions; the image half runs once for them."""
        return [
            Question(file, tuple(prompt for _, prompt in asked), tuple(number for number, _ in asked))
            for file, asked in self.captions.items()
        ]

    def score(self, answers: Iterable[ImageAnswer]) -> Figures:
        """See `score`."""
        return score(self.truth, answers)

    def picture(self, image_id: int) -> tuple[Path, Floats, Integers, tuple[str, ...]]:
        """For pictures: the file, its annotated boxes (N, 4), their labels (N,), and the names of all labels."""
        file, prompt = self._places[image_id]
        boxes = self.truth.boxes[image_id]
        labels = np.repeat(np.arange(len(boxes)), [len(rows) for rows in boxes])
        names = tuple(" / ".join(prompt.caption[start:end] for start, end in spans) for spans in prompt.spans)
        return file.path, np.concatenate([np.zeros((0, 4)), *boxes]), labels, names

    @cached_property
    def _places(self) -> dict[int, tuple[ImageFile, Spans]]:
        return {number: (file, prompt) for file, asked in self.captions.items() for number, prompt in asked}

    def description(self) -> dict[str, str]:
        """The protocol spelled out, for reports."""
        return {
            "figures": f"R@k: share of phrases with a box of IoU >= {HIT_IOU} among the first k; any of the phrase's "
            "boxes counts, or (merged) the smallest box around all of them",
            "prompt": "the caption, its phrases by their characters (tokens_positive_eval)",
            "boxes": "300 best box-phrase pairs of each caption, then ranked in each phrase",
        }


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
