"""Evaluation during a training run: the figures of every split, and a few predictions drawn.

What a split is measured by follows from its file: COCO's AP for COCO's format, LVIS' for LVIS', Precision@k for
referring expressions, F1 and N-acc for those that may describe nothing (gRefCOCO).
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from groundingdino.config import TrainConfig
from groundingdino.data import load_expressions
from groundingdino.data.formats import registry
from groundingdino.evaluation import (
    EvaluationOptions,
    ImageAnswer,
    ReferringFigures,
    ReferringProtocol,
    evaluate,
    metrics,
)
from groundingdino.evaluation import report as reports
from groundingdino.evaluation.annotation_file import read_document
from groundingdino.evaluation.coco import CocoDetection
from groundingdino.evaluation.detection_misses import SHOWN_SCORE, as_detections
from groundingdino.evaluation.grefcoco import NO_TARGET, Grefcoco
from groundingdino.evaluation.lvis import Lvis
from groundingdino.inference.engine import TOP_K_PER_CAPTION
from groundingdino.inference.visualize import draw_comparison
from groundingdino.inputs.images import open_image
from groundingdino.model import GroundingDINO
from groundingdino.training.setup import one_each

Figures = dict[str, dict[str, float]]  # split -> figure -> value, those that there are; the first figure decides
PICTURE_SIDE = 640  # pixels of the longer side, at most
Protocol = ReferringProtocol | CocoDetection | Lvis | Grefcoco


@dataclass(frozen=True)
class Assessment:
    """The result of one evaluation, the same on every process."""

    figures: Figures
    per_category: dict[str, tuple[tuple[str, float], ...]]  # split -> name and AP; empty for expressions
    shown: tuple[ImageAnswer, ...] = ()  # of the first split, for pictures; in the main process

    @property
    def deciding(self) -> float:
        """The first figure of the first split, by which the best checkpoint is chosen; -1 without any split."""
        first = next(iter(self.figures.values()), {})
        return next(iter(first.values()), -1.0)

    def lines(self) -> Iterator[str]:
        """The figures of each split in one line, and a table of the AP of each of its categories, in percent."""
        for split, values in self.figures.items():
            yield f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            rows = [row for row in self.per_category[split] if not math.isnan(row[1])]
            yield from (f"  {line}" for line in reports.category_table(rows))


def load_protocol(path: Path, images: Path, allow_outside: bool = False) -> Protocol:
    """A file's evaluation protocol. ValueError for one that is missing, wrong, or of a format that asks nothing."""
    found = registry.find_format(path)
    if found == "coco":
        return CocoDetection.load(path, images, allow_outside=allow_outside)
    if found == "lvis":
        return Lvis.load(path, images)
    if found == "mdetr":
        document = read_document(path, "images", "annotations")
        if any(one.get("category_id") == NO_TARGET for one in document["annotations"]):
            return Grefcoco.load(path, images)
        return ReferringProtocol(load_expressions(path, allow_outside=allow_outside), images)
    raise ValueError(f"{path}: to evaluate, give COCO's or LVIS' json, or MDETR's json of expressions, not {found}")


class Assessor:
    """Evaluates a detector on the splits of `config.data.evaluation`."""

    def __init__(self, config: TrainConfig) -> None:
        """ValueError for an annotation file that is missing or wrong: now, not after the first epoch."""
        data = config.data
        self._options = EvaluationOptions(
            batch_size=data.evaluation_batch_size,
            precision=config.precision,
            scale=(data.evaluation_side, data.evaluation_long_side),
            workers=data.workers,
        )
        folders = one_each("evaluation_image_dirs", data.evaluation_image_dirs, len(data.evaluation), "splits")
        self._splits = {
            split: load_protocol(data.root / file, data.root / folder, data.allow_outside)
            for (split, file), folder in zip(data.evaluation, folders, strict=True)
        }
        self._count = config.pictures

    def assess(self, model: GroundingDINO) -> Assessment:
        """Evaluate every image of every split once, sharded over the processes."""
        figures: Figures = {}
        per_category = {}
        shown: tuple[ImageAnswer, ...] = ()
        for number, (split, protocol) in enumerate(self._splits.items()):
            watched = _Watched(protocol, self._wanted(protocol) if number == 0 else frozenset())
            referring = isinstance(protocol, ReferringProtocol)
            keep = metrics.AP_DETECTIONS if referring else TOP_K_PER_CAPTION
            found = evaluate(model, watched, self._options, boxes_per_caption=keep).figures
            values = _referring_figures(protocol, found) if referring else found.values
            figures[split] = {name: value for name, value in values.items() if not math.isnan(value)}
            per_category[split] = () if referring else found.per_category
            shown = shown or tuple(watched.kept)
        return Assessment(figures, per_category, shown)

    def _wanted(self, protocol: Protocol) -> frozenset[int]:
        ids = [number for question in protocol.questions() for number in question.ids]
        return frozenset(ids[place] for place in spread(len(ids), self._count))

    def pictures(self, assessment: Assessment) -> list[Image.Image]:
        """Ground truth beside the answer for `config.pictures` images or expressions spread over the first split."""
        if not self._splits:
            return []
        protocol = next(iter(self._splits.values()))
        drawn = []
        for answer in sorted(assessment.shown, key=lambda answer: answer.image_id):
            file, boxes, labels, names = protocol.picture(answer.image_id)
            best = answer.scores >= SHOWN_SCORE  # of an expression the best box alone
            if isinstance(protocol, ReferringProtocol):
                best = np.arange(len(answer.scores)) == 0
            truth = as_detections(boxes, np.ones(len(boxes)), labels, names)
            found = as_detections(answer.boxes[best], answer.scores[best], answer.labels[best], names)
            picture = draw_comparison(open_image(file), truth, found)
            picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            drawn.append(picture)
        return drawn


@dataclass
class _Watched:
    """A protocol that keeps the answers of some images while they are scored."""

    protocol: Any
    wanted: frozenset[int]
    kept: list[ImageAnswer] = field(default_factory=list)

    def questions(self) -> Sequence[Any]:
        return self.protocol.questions()  # type: ignore[no-any-return]

    def score(self, answers: Iterator[ImageAnswer]) -> Any:
        return self.protocol.score(self._watch(answers))

    def _watch(self, answers: Iterator[ImageAnswer]) -> Iterator[ImageAnswer]:
        for answer in answers:
            if answer.image_id in self.wanted:
                self.kept.append(answer)
            yield answer


def _referring_figures(protocol: Any, found: ReferringFigures) -> dict[str, float]:
    """Over all expressions; where a file mixes data sets, for each of them too."""
    sizes = Counter(expression.dataset_name for expression in protocol.expressions)
    figures = {}
    for rank in next(iter(found.precision.values())):
        hits = sum(found.precision[name][rank] * size for name, size in sizes.items())
        figures[f"precision@{rank}"] = hits / len(protocol.expressions)
    figures["average precision"] = found.average_precision
    if len(sizes) > 1:
        rows = found.precision.items()
        figures |= {f"{name} precision@{rank}": value for name, row in rows for rank, value in row.items()}
    return figures


def spread(total: int, count: int) -> list[int]:
    """`count` evenly spaced numbers below `total`; all of them where there are fewer."""
    count = min(count, total)
    return [number * total // count for number in range(count)]
