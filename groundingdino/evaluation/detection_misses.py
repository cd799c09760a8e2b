"""Pictures of what a detection protocol's answers miss: annotated boxes beside the boxes that were found."""

import heapq
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from groundingdino.evaluation.answer_file import read_answers
from groundingdino.evaluation.answers import Floats, ImageAnswer, Integers, iou_matrix
from groundingdino.inference.visualize import draw_comparison
from groundingdino.inputs.images import open_image
from groundingdino.structures import Detections

HIT_IOU = 0.5
SHOWN_SCORE = 0.3  # boxes of less are neither drawn nor do they find anything


class DrawableProtocol(Protocol):
    """What pictures need of a protocol."""

    def picture(self, image_id: int) -> tuple[Path, Floats, Integers, tuple[str, ...]]:
        """An image's file, its annotated boxes (N, 4) xyxy, their labels (N,), and the names of all labels."""
        ...


def save_detection_misses(protocol: DrawableProtocol, answers: Path, folder: Path, count: int) -> list[Path]:
    """Draw the `count` images with most misses into `folder` as 001_missed7_image139.png, ...; fewer if fewer miss.

    An object is missed where no box of its label with score >= 0.3 has IoU >= 0.5 with it.
    """
    worst = heapq.nsmallest(count, _misses(protocol, read_answers(answers)[1]), key=lambda miss: (-miss[0], miss[1]))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for place, (missed, image_id, answer) in enumerate(worst, start=1):
        file, boxes, labels, names = protocol.picture(image_id)
        shown = answer.scores >= SHOWN_SCORE
        truth = as_detections(boxes, np.ones(len(boxes)), labels, names)
        found = as_detections(answer.boxes[shown], answer.scores[shown], answer.labels[shown], names)
        path = folder / f"{place:03d}_missed{missed}_image{image_id}.png"
        draw_comparison(open_image(file), truth, found).save(path)
        paths.append(path)
    return paths


def _misses(protocol: DrawableProtocol, answers: Iterable[ImageAnswer]) -> Iterable[tuple[int, int, ImageAnswer]]:
    """(objects missed, image id, answer) of the images with any."""
    for answer in answers:
        _, boxes, labels, _ = protocol.picture(answer.image_id)
        finds = iou_matrix(answer.boxes, boxes) >= HIT_IOU  # (K, N)
        finds &= (answer.labels[:, None] == labels) & (answer.scores >= SHOWN_SCORE)[:, None]
        missed = int((~finds.any(axis=0)).sum())
        if missed:
            yield missed, answer.image_id, answer


def as_detections(boxes: Floats, scores: Floats, labels: Integers, names: tuple[str, ...]) -> Detections:
    """Boxes (K, 4) xyxy with their scores (K,) and labels (K,), for drawing; `names` has one per label."""
    rows = [torch.from_numpy(np.array(column)) for column in (boxes, scores, labels)]
    return Detections(
        rows[0].float().reshape(-1, 4),
        rows[1].float(),
        rows[2].long(),
        tuple(names[label] for label in labels.tolist()),
    )
