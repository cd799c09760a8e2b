"""Pictures of an evaluation's misses, the worst first: the annotated box beside the answer."""

from collections.abc import Sequence
from pathlib import Path

import torch

from groundingdino.data.annotations import ReferringExpression
from groundingdino.evaluation.answers import ImageAnswer
from groundingdino.evaluation.metrics import HIT_IOU, iou_with
from groundingdino.inference.visualize import draw_comparison
from groundingdino.inputs.images import open_image
from groundingdino.structures import Detections


def worst_misses(
    expressions: Sequence[ReferringExpression], answers: Sequence[ImageAnswer]
) -> list[tuple[float, ImageAnswer]]:
    """(IoU of the best box, answer) of every miss: the least IoU first, of equal ones the most confident."""
    overlaps = [
        (float(iou_with(answer.boxes[:1], expressions[answer.image_id].box).max(initial=0)), answer)
        for answer in answers
    ]
    misses = [(iou, answer) for iou, answer in overlaps if iou < HIT_IOU]
    return sorted(misses, key=lambda miss: (miss[0], -float(miss[1].scores.max(initial=0)), miss[1].image_id))


def save_misses(
    expressions: Sequence[ReferringExpression], answers: Sequence[ImageAnswer], images: Path, folder: Path, count: int
) -> list[Path]:
    """Draw the `count` worst misses (fewer where there are fewer) into `folder` as 001_iou0.00_entry17.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for place, (iou, answer) in enumerate(worst_misses(expressions, answers)[:count], start=1):
        expression = expressions[answer.image_id]
        truth = _one(expression.box, 1.0, expression.caption)
        best = [
            (box, score, expression.caption) for box, score in zip(answer.boxes[:1], answer.scores[:1], strict=True)
        ]
        found = _one(*best[0]) if best else _none()
        picture = draw_comparison(open_image(images / expression.file_name), truth, found)
        path = folder / f"{place:03d}_iou{iou:.2f}_entry{expression.number}.png"
        picture.save(path)
        paths.append(path)
    return paths


def _one(box: Sequence[float], score: float, name: str) -> Detections:
    boxes = torch.tensor([[float(side) for side in box]])
    return Detections(boxes, torch.tensor([float(score)]), torch.zeros(1, dtype=torch.int64), (name,))


def _none() -> Detections:
    return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), ())
