"""Evaluation during a training run: the figures of every split, and a few predictions drawn."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from groundingdino.config import TrainConfig
from groundingdino.data import ReferringExpression, load_expressions
from groundingdino.evaluation import (
    Evaluation,
    EvaluationOptions,
    ReferringFigures,
    ReferringProtocol,
    evaluate_referring,
)
from groundingdino.inference.visualize import draw_comparison
from groundingdino.inputs.images import open_image
from groundingdino.model import GroundingDINO
from groundingdino.structures import Detections

Figures = dict[str, dict[str, float]]  # split -> figure -> value
DECIDING = "precision@1"
PICTURE_SIDE = 640  # pixels of the longer side, at most


@dataclass(frozen=True)
class Assessment:
    """The result of one evaluation, the same on every process."""

    figures: Figures
    evaluations: dict[str, Evaluation[ReferringFigures]]  # split -> everything

    @property
    def deciding(self) -> float:
        """Precision@1 of the first split, by which the best checkpoint is chosen; -1 without any split."""
        return next(iter(self.figures.values()))[DECIDING] if self.figures else -1.0


class Assessor:
    """Evaluates a detector on the splits of `config.data.evaluation`."""

    def __init__(self, config: TrainConfig) -> None:
        """ValueError for an annotation file that is missing or wrong: now, not after the first epoch."""
        data = config.data
        self._images = data.root / data.evaluation_image_dir
        self._options = EvaluationOptions(
            batch_size=data.evaluation_batch_size,
            precision=config.precision,
            scale=(data.evaluation_side, data.evaluation_long_side),
            workers=data.workers,
        )
        self._splits = {split: load_expressions(data.root / file) for split, file in data.evaluation}

    def assess(self, model: GroundingDINO) -> Assessment:
        """Evaluate every expression of every split once, sharded over the processes."""
        found = {
            split: evaluate_referring(model, ReferringProtocol(expressions, self._images), self._options)
            for split, expressions in self._splits.items()
        }
        figures = {split: _figures(self._splits[split], evaluation.figures) for split, evaluation in found.items()}
        return Assessment(figures, found)

    def pictures(self, assessment: Assessment, count: int) -> list[Image.Image]:
        """Ground truth beside the best box, for `count` expressions spread over the first split."""
        if not self._splits:
            return []
        split, expressions = next(iter(self._splits.items()))
        answers = assessment.evaluations[split].figures.answers
        drawn = []
        for number in spread(len(answers), count):
            expression = expressions[answers[number].image_id]
            image = open_image(self._images / expression.file_name)
            truth = _detection(expression.box, 1.0, expression.caption)
            best = answers[number]
            picture = draw_comparison(image, truth, _detection(best.boxes[0], best.scores[0], expression.caption))
            picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            drawn.append(picture)
        return drawn


def _detection(box: Sequence[float], score: float, name: str) -> Detections:
    boxes = torch.tensor([[float(side) for side in box]])
    return Detections(boxes, torch.tensor([float(score)]), torch.zeros(1, dtype=torch.int64), (name,))


def _figures(expressions: Sequence[ReferringExpression], evaluation: ReferringFigures) -> dict[str, float]:
    """Over all expressions; where a file mixes data sets, for each of them too."""
    sizes = Counter(expression.dataset_name for expression in expressions)
    figures = {}
    for rank in next(iter(evaluation.precision.values())):
        hits = sum(evaluation.precision[name][rank] * size for name, size in sizes.items())
        figures[f"precision@{rank}"] = hits / len(expressions)
    figures["average precision"] = evaluation.average_precision
    if len(sizes) > 1:
        rows = evaluation.precision.items()
        figures |= {f"{name} precision@{rank}": value for name, row in rows for rank, value in row.items()}
    return figures


def spread(total: int, count: int) -> list[int]:
    """`count` evenly spaced numbers below `total`; all of them where there are fewer."""
    count = min(count, total)
    return [number * total // count for number in range(count)]
