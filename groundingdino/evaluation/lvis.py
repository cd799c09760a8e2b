"""LVIS v1: standard AP (300 boxes an image) and fixed AP (10,000 boxes a category over the data set).

The figures are those of `lvis` 0.5.3 and of mmdet's `LVISFixedAPMetric`, from numpy alone. Predictions stream: what is
held is the 300 best boxes an image, or the 10,000 best of each category, never all.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundingdino.evaluation import lvis_matching
from groundingdino.evaluation.annotation_file import ImageFile, image_file, read_document
from groundingdino.evaluation.answers import Floats, ImageAnswer, Integers, xywh_to_xyxy
from groundingdino.evaluation.lvis_matching import AREAS, Detections, ImageCategory
from groundingdino.evaluation.report import Figures
from groundingdino.evaluation.runner import Question
from groundingdino.inference.prompts import Categories
from groundingdino.inference.vocabulary import LVIS_NAMES_PER_CAPTION as NAMES_PER_CAPTION

PER_IMAGE = 300  # boxes of an image that count for standard AP
PER_CATEGORY = 10_000  # boxes of a category, over all images, that count for fixed AP
ROWS_AT_ONCE = 2_000_000  # predictions that are sorted into categories together
COCO_HOST = "http://images.cocodataset.org/"
FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}


@dataclass(frozen=True)
class LvisTruth:
    """An LVIS annotation file without its masks. Label l of an answer is category l; I images are in id order."""

    category_ids: tuple[int, ...]
    names: tuple[str, ...]  # as in the file, "aerosol_can"
    frequencies: tuple[str, ...]  # "r", "c" or "f" for each category
    image_ids: Integers  # (I,) rising
    objects: tuple[ImageCategory, ...]  # boxes of an image and category, by category, then image
    judged: NDArray[np.bool_]  # (C, I) the category is annotated in the image, or known to be absent
    not_exhaustive: NDArray[np.bool_]  # (C, I) a box that matches none is no mistake

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "LvisTruth":
        """Categories in the file's order."""
        categories, image_ids = document["categories"], np.sort([image["id"] for image in document["images"]])
        row = {category["id"]: number for number, category in enumerate(categories)}
        column = {int(image_id): number for number, image_id in enumerate(image_ids)}
        grouped: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
        for one in document["annotations"]:
            grouped.setdefault((row[one["category_id"]], column[one["image_id"]]), []).append(one)
        judged = np.zeros((len(categories), len(image_ids)), bool)
        not_exhaustive = judged.copy()
        for image in document["images"]:
            judged[[row[one] for one in image["neg_category_ids"]], column[image["id"]]] = True
            not_exhaustive[[row[one] for one in image["not_exhaustive_category_ids"]], column[image["id"]]] = True
        for place in grouped:
            judged[place] = True
        objects = tuple(_image_category(*place, grouped[place]) for place in sorted(grouped))
        ids, names, frequencies = zip(*((c["id"], c["name"], c["frequency"]) for c in categories), strict=True)
        return cls(ids, names, frequencies, image_ids, objects, judged, not_exhaustive)

    @cached_property
    def objects_by_image(self) -> dict[int, list[ImageCategory]]:
        """Image id -> its objects, category by category."""
        grouped: dict[int, list[ImageCategory]] = {}
        for one in self.objects:
            grouped.setdefault(int(self.image_ids[one.image]), []).append(one)
        return grouped


def _image_category(category: int, image: int, annotations: list[Mapping[str, Any]]) -> ImageCategory:
    ignored = np.array([bool(one.get("ignore", 0)) for one in annotations])
    areas = np.array([one["area"] for one in annotations], np.float64)
    return ImageCategory(category, image, xywh_to_xyxy([one["bbox"] for one in annotations]), areas, ignored)


@dataclass(frozen=True)
class Lvis:
    """LVIS v1, its val or minival images."""

    truth: LvisTruth
    files: Mapping[int, ImageFile]  # image id -> image
    names_per_caption: int | None = NAMES_PER_CAPTION  # None: as many as fit

    @classmethod
    def load(cls, path: Path, root: Path, names_per_caption: int | None = NAMES_PER_CAPTION) -> "Lvis":
        """Of an annotation file; images are where their `coco_url` says below `root`: train2017/ and val2017/."""
        document = read_document(path, "images", "annotations", "categories")
        files = {
            image["id"]: image_file(root, {**image, "file_name": _file_name(image)}, path)
            for image in document["images"]
        }
        return cls(LvisTruth.from_document(document), files, names_per_caption)

    def questions(self) -> Sequence[Question]:
        """Each image with all names; the image half runs once for its captions."""
        prompts = (Categories(self.truth.names, self.names_per_caption),)
        return [Question(file, prompts, (image_id,)) for image_id, file in self.files.items()]

    def score(self, answers: Iterable[ImageAnswer]) -> Figures:
        """See `score`."""
        return score(self.truth, answers)

    def picture(self, image_id: int) -> tuple[Path, Floats, Integers, tuple[str, ...]]:
        """For pictures: the file, its annotated boxes (N, 4), their labels (N,), and the names of all labels."""
        objects = self.truth.objects_by_image.get(image_id, ())
        boxes = [one.boxes for one in objects]
        labels = np.repeat([one.category for one in objects], [len(rows) for rows in boxes]).astype(np.int64)
        return self.files[image_id].path, np.concatenate([np.zeros((0, 4)), *boxes]), labels, self.truth.names

    def description(self) -> dict[str, str]:
        """The protocol spelled out, for reports."""
        most = self.names_per_caption
        captions = "as many as fit into a caption" if most is None else f"{most} a caption"
        return {
            "figures": f"LVIS fixed AP: the {PER_CATEGORY:,} best boxes of each category, whatever the image",
            "standard figures": f"LVIS AP of the {PER_IMAGE} best boxes of each image",
            "prompt": f"all {len(self.truth.names)} category names, cleaned of underscores and parentheses, {captions}"
            + (" as published" if most == NAMES_PER_CAPTION else " (published: 40)"),
            "boxes": "300 best box-category pairs of each caption, no NMS",
        }


def _file_name(image: Mapping[str, Any]) -> str:
    return str(image["coco_url"]).removeprefix(COCO_HOST) if "coco_url" in image else str(image["file_name"])


def score(truth: LvisTruth, answers: Iterable[ImageAnswer]) -> Figures:
    """Standard and fixed AP in one pass over the answers: "AP", "APr", ... are the fixed ones, as published.

    Figures are in [0, 1], NaN where there is nothing to find; the AP per category is the fixed one.
    """
    standard, fixed = StandardSelection(truth), FixedSelection(truth)
    for answer in answers:
        standard.add(answer)
        fixed.add(answer)
    fixed_figures = figures(truth, fixed.categories())
    standard_figures = figures(truth, standard.categories(), with_recall=True)
    standard_values = {f"standard {name}": value for name, value in standard_figures.values.items()}
    return Figures({**fixed_figures.values, **standard_values}, fixed_figures.per_category)


class StandardSelection:
    """The best boxes of each image, whatever their category."""

    def __init__(self, truth: LvisTruth, per_image: int = PER_IMAGE):
        self.truth, self.per_image = truth, per_image
        self.kept: list[Detections] = []

    def add(self, answer: ImageAnswer) -> None:
        best = np.argsort(-answer.scores, kind="stable")[: self.per_image]
        image = _column(self.truth, answer)
        columns = answer.labels[best], np.full(len(best), image), answer.boxes[best], answer.scores[best]
        rows = Detections.of(*columns)
        self.kept.append(rows.where(self.truth.judged[rows.categories, rows.images]))

    def categories(self) -> Iterator[Detections]:
        """The boxes of each category in turn."""
        yield from _split(Detections.concatenate(self.kept), len(self.truth.names))


class FixedSelection:
    """The best boxes of each category over the data set, without a limit per image.

    Which boxes are kept does not depend on the order in which images come: of equal scores the lower image id wins,
    within an image the box that was answered first.
    """

    def __init__(self, truth: LvisTruth, per_category: int = PER_CATEGORY):
        self.truth, self.per_category = truth, per_category
        self.kept = [Detections.none() for _ in truth.names]
        self.least = np.full(len(truth.names), -np.inf, np.float32)  # score that a further box must reach
        self.waiting: list[Detections] = []
        self.rows = 0

    def add(self, answer: ImageAnswer) -> None:
        image = np.full(len(answer.labels), _column(self.truth, answer))
        rows = Detections.of(answer.labels, image, answer.boxes, answer.scores)
        rows = rows.where(rows.scores >= self.least[rows.categories])
        self.waiting.append(rows)
        self.rows += len(rows.scores)
        if self.rows >= ROWS_AT_ONCE:
            self._sort_in()

    def categories(self) -> Iterator[Detections]:
        """The boxes of each category in turn, those of images that say nothing about the category left out."""
        self._sort_in()
        for rows in self.kept:
            yield rows.where(self.truth.judged[rows.categories, rows.images])

    def _sort_in(self) -> None:
        waiting = _split(Detections.concatenate(self.waiting), len(self.truth.names))
        self.waiting, self.rows = [], 0
        for category, new in enumerate(waiting):
            if len(new.scores):
                both = Detections.concatenate([self.kept[category], new])
                order = np.lexsort((both.images, -both.scores))[: self.per_category]
                self.kept[category] = both.where(order)
                if len(order) == self.per_category:
                    self.least[category] = both.scores[order[-1]]


def _column(truth: LvisTruth, answer: ImageAnswer) -> int:
    column = int(np.searchsorted(truth.image_ids, answer.image_id))
    if column == len(truth.image_ids) or truth.image_ids[column] != answer.image_id:
        raise ValueError(f"image {answer.image_id} is not in the annotation file")
    return column


def _split(rows: Detections, categories: int) -> Iterator[Detections]:
    """The rows of each category in turn, in their order."""
    order = np.argsort(rows.categories, kind="stable")
    ends = np.searchsorted(rows.categories[order], np.arange(categories + 1))
    for begin, end in zip(ends[:-1], ends[1:], strict=True):
        yield rows.where(order[begin:end])


def figures(truth: LvisTruth, detections: Iterable[Detections], with_recall: bool = False) -> Figures:
    """AP, AP50, AP75, by area and by frequency of the category; with `with_recall` also AR."""
    precision, recall = _accumulate(truth, detections)  # (C, areas, T, recalls), (C, areas, T)
    values = {
        "AP": _mean(precision[:, 0]),
        "AP50": _mean(precision[:, 0, 0]),
        "AP75": _mean(precision[:, 0, 5]),
        **{f"AP{area[0]}": _mean(precision[:, n]) for n, area in enumerate(AREAS) if n},
    }
    frequencies = np.array(truth.frequencies)
    values |= {f"AP{letter}": _mean(precision[frequencies == letter, 0]) for letter in FREQUENCIES}
    if with_recall:
        names = [f"AR{'' if n == 0 else area[0]}@{PER_IMAGE}" for n, area in enumerate(AREAS)]
        values |= {name: _mean(recall[:, n]) for n, name in enumerate(names)}
    per_category = tuple((name, _mean(row[0])) for name, row in zip(truth.names, precision, strict=True))
    return Figures(values, per_category)


def _accumulate(truth: LvisTruth, detections: Iterable[Detections]) -> tuple[Floats, Floats]:
    objects: list[list[ImageCategory]] = [[] for _ in truth.names]
    for one in truth.objects:
        objects[one.category].append(one)
    curves = []
    for category, rows in enumerate(detections):
        not_exhaustive = truth.not_exhaustive[category]
        curves.append(lvis_matching.precision_and_recall(objects[category], rows, not_exhaustive))
    precision, recall = zip(*curves, strict=True)
    return np.stack(precision), np.stack(recall)


def _mean(values: Floats) -> float:
    """Of the entries for which there was something to find, which the others' NaN marks."""
    counted = values[~np.isnan(values)]
    return float(counted.mean()) if counted.size else float("nan")
