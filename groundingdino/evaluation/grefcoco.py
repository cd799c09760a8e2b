"""Generalised referring expressions (gRefCOCO): none, one or several objects for each expression."""

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
from groundingdino.inference.prompts import Referring

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


@dataclass(frozen=True)
class Grefcoco:
    """A gRefCOCO file; the expressions of an image file are asked together."""

    truth: GrefcocoTruth
    expressions: Mapping[ImageFile, tuple[tuple[int, str], ...]]  # image file -> (image id, expression)
    threshold: float = SCORE_THRESHOLD

    @classmethod
    def load(cls, path: Path, images: Path) -> "Grefcoco":
        """Of an MDETR-style annotation file and the folder of its images. ValueError if it is not such a file."""
        document = read_document(path, "images", "annotations")
        expressions: dict[ImageFile, tuple[tuple[int, str], ...]] = {}
        for image in document["images"]:
            file = image_file(images, image, path)
            expressions[file] = (*expressions.get(file, ()), (image["id"], image["caption"]))
        return cls(GrefcocoTruth.from_document(document), expressions)

    def questions(self) -> Sequence[Question]:
        """Each image file with its expressions; the image half runs once for them."""
        return [
            Question(file, tuple(Referring(caption) for _, caption in asked), tuple(number for number, _ in asked))
            for file, asked in self.expressions.items()
        ]

    def score(self, answers: Iterable[ImageAnswer]) -> Figures:
        """See `score`."""
        return score(self.truth, answers, self.threshold)

    def picture(self, image_id: int) -> tuple[Path, Floats, Integers, tuple[str, ...]]:
        """For pictures: the file, its annotated boxes (N, 4), their labels (N,), and the names of all labels."""
        file, caption = self._places[image_id]
        boxes = self.truth.boxes[image_id]
        return file.path, boxes, np.zeros(len(boxes), np.int64), (caption,)

    @cached_property
    def _places(self) -> dict[int, tuple[ImageFile, str]]:
        return {number: (file, text) for file, asked in self.expressions.items() for number, text in asked}

    def description(self) -> dict[str, str]:
        """The protocol spelled out, for reports."""
        return {
            "figures": f"boxes of score >= {self.threshold:g} matched to the targets one to one at IoU {HIT_IOU}; "
            "F1_score: share of expressions with F1 = 1, T_acc and N_acc: with and without target told apart",
            "prompt": "the expression",
            "score": "best token of the expression, special tokens included (mmdet)",
        }


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
