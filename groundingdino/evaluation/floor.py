"""What answering without a model scores on referring expressions: a floor for Precision@1."""

from collections.abc import Sequence

import numpy as np

from groundingdino.data.annotations import ReferringExpression
from groundingdino.evaluation import metrics
from groundingdino.evaluation.answers import Floats, ImageAnswer

WAYS = {
    "largest box": "always the largest of the boxes that are annotated in the image",
    "centre box": "always the annotated box whose centre is nearest to the image's",
}


def floors(expressions: Sequence[ReferringExpression]) -> dict[str, dict[str, float]]:
    """Way of answering -> data set -> Precision@1. The boxes to choose from are those of the image's expressions.

    Raises:
        ValueError: if the annotations do not give an image's size.
    """
    boxes: dict[str, Floats] = {}
    for expression in expressions:
        known = boxes.get(expression.file_name, np.zeros((0, 4)))
        boxes[expression.file_name] = np.unique(np.concatenate([known, [expression.box]]), axis=0)
    of_image = {expression.file_name: expression for expression in expressions}
    result: dict[str, dict[str, float]] = {}
    for way in WAYS:
        chosen = {name: _choose(way, boxes[name], expression) for name, expression in of_image.items()}
        score, label = np.ones(1), np.zeros(1, np.int64)
        answers = [ImageAnswer(n, chosen[e.file_name][None], score, label) for n, e in enumerate(expressions)]
        result[way] = {name: row[1] for name, row in metrics.precision(expressions, answers, ranks=(1,)).items()}
    return result


def _choose(way: str, boxes: Floats, expression: ReferringExpression) -> Floats:
    if way == "largest box":
        return np.asarray(boxes[(boxes[:, 2:] - boxes[:, :2]).prod(axis=1).argmax()])
    if expression.size is None:
        raise ValueError(f"images entry {expression.number}: no width and height, which the centre box needs")
    away = (boxes[:, :2] + boxes[:, 2:]) / 2 - np.array(expression.size) / 2
    return np.asarray(boxes[(away**2).sum(axis=1).argmin()])
