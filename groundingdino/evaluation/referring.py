"""Referring expressions (RefCOCO, RefCOCO+, RefCOCOg and files of that form): Precision@k and a class-agnostic AP."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundingdino.data.annotations import ReferringExpression
from groundingdino.evaluation import metrics, runner
from groundingdino.evaluation.annotation_file import ImageFile
from groundingdino.evaluation.answers import Floats, ImageAnswer, Integers
from groundingdino.evaluation.runner import Evaluation, EvaluationOptions, Question
from groundingdino.inference.prompts import Referring, Scoring
from groundingdino.inputs import noun_phrases
from groundingdino.model import GroundingDINO

SCORING = {
    "max": "best token of the sentence, special tokens included (mmdet)",
    "subject": "mean over the tokens of the subject phrase",
    "llmdet": "LLMDet's: mean over the tokens of its subject phrase; of the 30 best boxes, those at the sides that the "
    "sentence names get up to 0.7 more for each",
}


@dataclass(frozen=True)
class ReferringFigures:
    """What a model makes of referring expressions."""

    precision: dict[str, dict[int, float]]  # data set -> k -> Precision@k in [0, 1]
    average_precision: float  # in [0, 1]
    answers: tuple[ImageAnswer, ...]  # one for each expression, in their order
    scoring: Scoring


@dataclass(frozen=True)
class ReferringProtocol:
    """Expressions, each about one object of an image in the folder `images`."""

    expressions: Sequence[ReferringExpression]
    images: Path
    scoring: Scoring = "max"

    def __post_init__(self) -> None:
        if self.scoring not in SCORING:
            raise ValueError(f"scoring {self.scoring!r}: use one of {', '.join(SCORING)}")

    def questions(self) -> tuple[Question, ...]:
        """The images in the order of their first expression, each with all of its expressions."""
        members: dict[str, list[int]] = {}
        for index, expression in enumerate(self.expressions):
            members.setdefault(expression.file_name, []).append(index)
        return tuple(self._question(file_name, indices) for file_name, indices in members.items())

    def _question(self, file_name: str, indices: Sequence[int]) -> Question:
        return Question(
            image=ImageFile(self.images / file_name, self.expressions[indices[0]].size),
            prompts=tuple(Referring(self.expressions[index].caption, self.scoring) for index in indices),
            ids=tuple(indices),
            where=f"wanted by images entry {self.expressions[indices[0]].number} of the annotations",
        )

    def picture(self, image_id: int) -> tuple[Path, Floats, Integers, tuple[str, ...]]:
        """For pictures: the file, its annotated box (1, 4), the label of its only name (1,), and the caption."""
        expression = self.expressions[image_id]
        box = np.array([expression.box], np.float64)
        return self.images / expression.file_name, box, np.zeros(1, np.int64), (expression.caption,)

    def score(self, answers: Iterable[ImageAnswer]) -> ReferringFigures:
        """Precision@k of each data set, and the AP over all."""
        found = sorted(answers, key=lambda answer: answer.image_id)
        return ReferringFigures(
            precision=metrics.precision(self.expressions, found),
            average_precision=metrics.average_precision(self.expressions, found),
            answers=tuple(found),
            scoring=self.scoring,
        )


def evaluate_referring(
    model: GroundingDINO,
    protocol: ReferringProtocol,
    options: EvaluationOptions | None = None,
    *,
    device: torch.device | None = None,
    name: str = "the model",
    progress: Callable[[int], None] | None = None,
) -> Evaluation[ReferringFigures]:
    """`runner.evaluate` with as many boxes for each expression as the figures look at."""
    return runner.evaluate(
        model,
        protocol,
        options,
        device=device,
        boxes_per_caption=metrics.AP_DETECTIONS,
        name=name,
        progress=progress,
    )


def report(evaluation: Evaluation[ReferringFigures]) -> dict[str, Any]:
    """Plain data for a JSON file, with the protocol named."""
    figures, run = evaluation.figures, evaluation.report()
    scoring = f"{figures.scoring}: {SCORING[figures.scoring]}"
    if figures.scoring != "max":
        scoring += f", found with part-of-speech tags by {noun_phrases.TAGGER}"
    return {
        "protocol": {
            "precision": f"RefExp Precision@k: a box among the first k has IoU >= {metrics.HIT_IOU}",
            "average_precision": "COCO AP at IoU 0.5:0.95, class-agnostic, each expression an image of its own, "
            f"{metrics.AP_DETECTIONS} boxes each",
            "scoring": scoring,
            **run.pop("protocol"),
        },
        "precision": {name: {str(k): p for k, p in row.items()} for name, row in figures.precision.items()},
        "average_precision": figures.average_precision,
        **run,
    }
