"""Evaluation in the course of a training run: the figures of every split, and a few pictures."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from groundingdino.config import TrainConfig
from groundingdino.data import Expression, load_expressions
from groundingdino.evaluation import Evaluation, EvaluationOptions, evaluate_referring
from groundingdino.inputs.images import open_image
from groundingdino.model import GroundingDINO
from groundingdino.training.pictures import draw_answer

Figures = dict[str, dict[str, float]]  # split -> figure -> value
DECIDING = "precision@1"


@dataclass(frozen=True)
class Assessment:
    """What one evaluation has found, the same on every process."""

    figures: Figures
    evaluations: dict[str, Evaluation]  # split -> everything

    @property
    def deciding(self) -> float:
        """Precision@1 of the first split, which decides what checkpoint is the best; -1 without any split."""
        return next(iter(self.figures.values()))[DECIDING] if self.figures else -1.0


class Assessor:
    """Evaluates the splits of `config.data.evaluation` with the detector as it is."""

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
        """Ask every expression of every split once, shared among the processes."""
        found = {
            split: evaluate_referring(model, expressions, self._images, self._options)
            for split, expressions in self._splits.items()
        }
        figures = {split: _figures(self._splits[split], evaluation) for split, evaluation in found.items()}
        return Assessment(figures, found)

    def pictures(self, assessment: Assessment, count: int) -> list[Image.Image]:
        """The best answers to `count` expressions of the first split, spread over it."""
        if not self._splits:
            return []
        split, expressions = next(iter(self._splits.items()))
        answers = assessment.evaluations[split].answers
        drawn = []
        for number in spread(len(answers), count):
            expression = expressions[answers[number].index]
            image = open_image(self._images / expression.file_name)
            box, score = answers[number].boxes[0], float(answers[number].scores[0])
            drawn.append(draw_answer(image, expression.caption, expression.box, box.tolist(), score))
        return drawn


def _figures(expressions: Sequence[Expression], evaluation: Evaluation) -> dict[str, float]:
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
    """`count` of the numbers below `total` (all where there are fewer) at even distances."""
    count = min(count, total)
    return [number * total // count for number in range(count)]
