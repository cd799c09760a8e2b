"""COCO detection: AP and AR over a COCO annotation file, per category, and for the 48 / 17 open-vocabulary split."""

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundingdino.evaluation.annotation_file import image_file, read_document
from groundingdino.evaluation.answers import Floats, ImageAnswer, Integers, xywh_to_xyxy
from groundingdino.evaluation.report import Figures
from groundingdino.evaluation.runner import Question
from groundingdino.inference.prompts import Categories
from groundingdino.inference.vocabulary import Vocabulary

IMAGES_AT_ONCE = 500  # matched together
MAX_DETECTIONS = (1, 10, 100)  # per image and category; the last is that of AP
MAX_DETECTIONS_SPLIT = 1000  # mmdet takes the base and novel figures with this many, the others with 100
Array = NDArray[Any]
AREAS = ("all", "small", "medium", "large")

BASE_48 = (
    "person, bicycle, car, motorcycle, train, truck, boat, bench, bird, horse, sheep, bear, zebra, giraffe, backpack, "
    "handbag, suitcase, frisbee, skis, kite, surfboard, bottle, fork, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, pizza, donut, chair, bed, toilet, tv, laptop, mouse, remote, microwave, oven, toaster, "
    "refrigerator, book, clock, vase, toothbrush"
).split(", ")
NOVEL_17 = (
    "airplane, bus, cat, dog, cow, elephant, umbrella, tie, snowboard, skateboard, cup, knife, cake, couch, keyboard, "
    "sink, scissors"
).split(", ")


@dataclass(frozen=True)
class CategorySplit:
    """Two groups of category names whose AP is reported apart; the rest of the categories is left out."""

    base: tuple[str, ...] = tuple(BASE_48)
    novel: tuple[str, ...] = tuple(NOVEL_17)


@dataclass(frozen=True)
class CocoTruth:
    """A COCO annotation file; label l of an answer is `category_ids[l]`."""

    document: dict[str, Any]  # with "images", "annotations", "categories"
    category_ids: tuple[int, ...]
    names: tuple[str, ...]
    split: CategorySplit | None = None

    @classmethod
    def from_document(cls, document: dict[str, Any], split: CategorySplit | None = None) -> "CocoTruth":
        """The categories in the file's order; with a split only those that it names."""
        wanted = None if split is None else {*split.base, *split.novel}
        categories = [c for c in document["categories"] if wanted is None or c["name"] in wanted]
        if wanted is not None and len(categories) < len(wanted):
            missing = sorted(wanted - {c["name"] for c in categories})
            raise ValueError(f"the annotation file lacks categories of the split: {', '.join(missing)}")
        ids, names = tuple(c["id"] for c in categories), tuple(c["name"] for c in categories)
        return cls(document, ids, names, split)

    @cached_property
    def images(self) -> dict[int, dict[str, Any]]:
        """Image id -> `images` entry."""
        return {image["id"]: image for image in self.document["images"]}

    def boxes(self, image_id: int) -> tuple[Floats, Integers]:
        """The objects of an image, crowds aside: (N, 4) xyxy and their labels (N,)."""
        label = {category_id: number for number, category_id in enumerate(self.category_ids)}
        own = [one for one in self._by_image.get(image_id, ()) if one["category_id"] in label]
        labels = np.array([label[one["category_id"]] for one in own], np.int64)
        return xywh_to_xyxy([one["bbox"] for one in own]), labels

    @cached_property
    def _by_image(self) -> dict[int, list[dict[str, Any]]]:
        grouped: dict[int, list[dict[str, Any]]] = {}
        for annotation in self.document["annotations"]:
            if not annotation.get("iscrowd", 0):
                grouped.setdefault(annotation["image_id"], []).append(annotation)
        return grouped


@dataclass(frozen=True)
class CocoDetection:
    """Every category of a COCO file asked of every image: COCO itself, and any file in its format."""

    truth: CocoTruth
    images: Path
    path: Path  # of the annotation file, for messages
    names_per_caption: int | None = None  # None: as many as its tokens allow
    vocabulary: Vocabulary | None = None  # prompts of the categories; None: their names
    allow_outside: bool = False  # file names may be absolute or leave the folder

    @classmethod
    def load(
        cls, path: Path, images: Path, split: CategorySplit | None = None, *, allow_outside: bool = False
    ) -> "CocoDetection":
        """Of an annotation file and the folder of its images. ValueError if it is not such a file."""
        document = read_document(path, "images", "annotations", "categories")
        return cls(CocoTruth.from_document(document, split), images, path, allow_outside=allow_outside)

    def questions(self) -> Sequence[Question]:
        """Each image with the names of all categories as mmdet prompts them."""
        plain = Categories(self.truth.names, self.names_per_caption)
        prompts = (plain if self.vocabulary is None else self.vocabulary.select(self.truth.names),)
        images = self.truth.document["images"]
        files = [image_file(self.images, image, self.path, self.allow_outside) for image in images]
        return [Question(file, prompts, (image["id"],)) for file, image in zip(files, images, strict=True)]

    def score(self, answers: Iterable[ImageAnswer]) -> Figures:
        """See `score`."""
        return score(self.truth, answers)

    def picture(self, image_id: int) -> tuple[Path, Floats, Integers, tuple[str, ...]]:
        """For pictures: the file, its annotated boxes (N, 4), their labels (N,), and the names of all labels."""
        return (self.images / self.truth.images[image_id]["file_name"], *self.truth.boxes(image_id), self.truth.names)

    def description(self) -> dict[str, str]:
        """The protocol spelled out, for reports."""
        captions = "as many as fit into a caption" if self.names_per_caption is None else str(self.names_per_caption)
        text = {
            "figures": "COCO AP and AR (pycocotools), at most 100 boxes per image and category",
            "prompt": f'all {len(self.truth.names)} category names, "a. b. c. ", {captions} at once',
            "boxes": "300 best box-category pairs of each caption, no NMS",
        }
        if self.vocabulary is not None:
            chosen = self.vocabulary.select(self.truth.names).names
            text["prompt"] = "; ".join(f"{one.name}: {', '.join(one.texts)}" for one in chosen)
            text["negatives"] = ", ".join(negative for one in chosen for negative in one.negatives) or "none"
        if self.truth.split is not None:
            text["split"] = f"{len(self.truth.split.base)} base and {len(self.truth.split.novel)} novel categories"
        return text


def score(truth: CocoTruth, answers: Iterable[ImageAnswer]) -> Figures:
    """COCO's twelve figures and the AP of each category, from one pass over the answers."""
    accumulator = CocoAccumulator(truth)
    for answer in answers:
        accumulator.add(answer)
    return accumulator.figures()


def precision_and_recall(
    truth: CocoTruth, answers: Iterable[ImageAnswer], max_detections: Sequence[int], areas: Sequence[str] = AREAS
) -> tuple[Array, Array]:
    """`CocoAccumulator.precision_and_recall` from one pass over the answers."""
    accumulator = CocoAccumulator(truth, max_detections, areas)
    for answer in answers:
        accumulator.add(answer)
    return accumulator.precision_and_recall()


class CocoAccumulator:
    """Takes answers one by one, in any order, and gives pycocotools' figures. An image may be answered once.

    Args:
        max_detections: boxes per image and category that count; the last is that of `figures`' AP.
        areas: of `AREAS`, all of them for `figures`.
    """

    def __init__(
        self, truth: CocoTruth, max_detections: Sequence[int] = MAX_DETECTIONS, areas: Sequence[str] = AREAS
    ) -> None:
        self.truth, self.areas = truth, areas
        self.max_detections = [*max_detections, *([] if truth.split is None else [MAX_DETECTIONS_SPLIT])]
        self._objects = _index(truth.document, [_complete(one) for one in truth.document["annotations"]])
        self._missing = dict.fromkeys(self._objects.getImgIds())  # an ordered set
        self._waiting: list[ImageAnswer] = []
        self._image_ids: list[int] = []
        self._evaluated: list[Array] = []

    def add(self, answer: ImageAnswer) -> None:
        """Count one answer in. ValueError if its image is not annotated, or was answered before."""
        if answer.image_id not in self._missing:
            raise ValueError(f"image {answer.image_id} is answered twice, or not in the annotation file")
        del self._missing[answer.image_id]
        self._waiting.append(answer)
        if len(self._waiting) == IMAGES_AT_ONCE:
            self._evaluate()

    def figures(self) -> Figures:
        """Shares in [0, 1], NaN where there is nothing to find; an image without an answer counts as without boxes.

        The figures are COCO's twelve; with a split also AP and AP50 of its base and novel categories, as in mmdet
        `evaluation/metrics/ov_coco_metric.py`.
        """
        precision, recall = self.precision_and_recall()
        at = MAX_DETECTIONS.index(100)
        values = {
            "AP": _mean(precision[:, :, :, 0, at]),
            "AP50": _mean(precision[0, :, :, 0, at]),
            "AP75": _mean(precision[5, :, :, 0, at]),
            **{f"AP_{area}": _mean(precision[:, :, :, n, at]) for n, area in enumerate(AREAS) if n},
            **{f"AR@{most}": _mean(recall[:, :, 0, n]) for n, most in enumerate(MAX_DETECTIONS)},
            **{f"AR_{area}@100": _mean(recall[:, :, n, at]) for n, area in enumerate(AREAS) if n},
        }
        if self.truth.split is not None:
            groups = {"base": self.truth.split.base, "novel": self.truth.split.novel}
            for group, members in groups.items():
                columns = [n for n, name in enumerate(self.truth.names) if name in members]
                values[f"{group}_AP"] = _mean(precision[:, :, columns, 0, -1])
                values[f"{group}_AP50"] = _mean(precision[0, :, columns, 0, -1])
        per_category = [(name, _mean(precision[:, :, n, 0, -1])) for n, name in enumerate(self.truth.names)]
        return Figures(values, tuple(per_category))

    def precision_and_recall(self) -> tuple[Array, Array]:
        """pycocotools' precision (T, R, C, A, M) and recall (T, C, A, M), -1 where there is nothing to find.

        Axes: T IoU thresholds, R recalls, C categories in the order of `truth`, A `areas`, M `max_detections`.
        """
        from pycocotools.cocoeval import COCOeval

        nothing = np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64)
        for image_id in list(self._missing):
            self.add(ImageAnswer(image_id, *nothing))
        self._evaluate()
        # Boxes of equal score rank by image id, however the answers came.
        evaluated = np.concatenate(self._evaluated, axis=2)[:, :, np.argsort(self._image_ids)]
        total = COCOeval(iouType="bbox")
        self._configure(total.params, self._image_ids)
        total._paramsEval, total.evalImgs = total.params, evaluated.ravel().tolist()
        with contextlib.redirect_stdout(io.StringIO()):
            total.accumulate()
        in_order = [sorted(self.truth.category_ids).index(category) for category in self.truth.category_ids]
        return total.eval["precision"][:, :, in_order], total.eval["recall"][:, in_order]

    def _evaluate(self) -> None:
        """Match the boxes that wait; pycocotools wants a dict for each, so they are few at once."""
        from pycocotools.cocoeval import COCOeval

        if not self._waiting:
            return
        with contextlib.redirect_stdout(io.StringIO()):
            part = COCOeval(self._objects, _results(self.truth, self._waiting), "bbox")
            self._configure(part.params, [answer.image_id for answer in self._waiting])
            part.evaluate()
        evaluated = np.empty(len(part.evalImgs), dtype=object)
        evaluated[:] = part.evalImgs
        self._evaluated.append(evaluated.reshape(len(self.truth.category_ids), len(self.areas), len(self._waiting)))
        self._image_ids += [int(image_id) for image_id in part.params.imgIds]  # in the order of evalImgs
        self._waiting = []

    def _configure(self, params: Any, image_ids: Sequence[int]) -> None:
        chosen = [place for place, area in enumerate(params.areaRngLbl) if area in self.areas]
        params.areaRng = [params.areaRng[place] for place in chosen]
        params.areaRngLbl = [params.areaRngLbl[place] for place in chosen]
        params.catIds, params.imgIds = sorted(self.truth.category_ids), sorted(image_ids)
        params.maxDets = self.max_detections


def _mean(values: Array) -> float:
    """Of the entries for which there was something to find (pycocotools marks the others with -1)."""
    counted = values[values > -1]
    return float(counted.mean()) if counted.size else float("nan")


def _complete(annotation: dict[str, Any]) -> dict[str, Any]:
    """With "area" and "iscrowd", which a user's own file may lack; a copy, as pycocotools writes into it."""
    x, y, width, height = annotation["bbox"]
    return {"area": width * height, "iscrowd": 0, **annotation}


def _results(truth: CocoTruth, group: Sequence[ImageAnswer]) -> Any:
    found: list[dict[str, Any]] = []
    for answer in group:
        rows = zip(answer.boxes.tolist(), answer.scores.tolist(), answer.labels.tolist(), strict=True)
        for (x1, y1, x2, y2), score_, label in rows:
            width, height = x2 - x1, y2 - y1
            found.append({
                "id": len(found) + 1,
                "image_id": answer.image_id,
                "category_id": truth.category_ids[label],
                "bbox": [x1, y1, width, height],
                "area": width * height,
                "score": score_,
                "iscrowd": 0,
            })  # fmt: skip
    return _index(truth.document, found)


def _index(document: dict[str, Any], annotations: list[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports on every step
        indexed = COCO()
        indexed.dataset = {**document, "annotations": annotations}
        indexed.createIndex()
    return indexed
