"""COCO detection: AP and AR over a COCO annotation file, per category, and for the 48 / 17 open-vocabulary split."""

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from groundingdino.evaluation.answers import ImageAnswer
from groundingdino.evaluation.report import Figures

IMAGES_AT_ONCE = 500  # handed to pycocotools together: it wants a dict for each box
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


def score(truth: CocoTruth, answers: Iterable[ImageAnswer]) -> Figures:
    """COCO's twelve figures and the AP of each category.

    The figures are pycocotools', with 1, 10 and 100 boxes per image and category.
    Figures are in [0, 1], NaN where there is nothing to find. Images without an answer count as answered with no box.
    With a split, also AP and AP50 of its base and novel categories (mmdet `evaluation/metrics/ov_coco_metric.py`).
    """
    max_detections = [*MAX_DETECTIONS, *([] if truth.split is None else [MAX_DETECTIONS_SPLIT])]
    precision, recall = precision_and_recall(truth, answers, max_detections)
    at = MAX_DETECTIONS.index(100)
    values = {
        "AP": _mean(precision[:, :, :, 0, at]),
        "AP50": _mean(precision[0, :, :, 0, at]),
        "AP75": _mean(precision[5, :, :, 0, at]),
        **{f"AP_{area}": _mean(precision[:, :, :, n, at]) for n, area in enumerate(AREAS) if n},
        **{f"AR@{most}": _mean(recall[:, :, 0, n]) for n, most in enumerate(MAX_DETECTIONS)},
        **{f"AR_{area}@100": _mean(recall[:, :, n, at]) for n, area in enumerate(AREAS) if n},
    }
    if truth.split is not None:
        groups = {"base": truth.split.base, "novel": truth.split.novel}
        for group, members in groups.items():
            columns = [n for n, name in enumerate(truth.names) if name in members]
            values[f"{group}_AP"] = _mean(precision[:, :, columns, 0, -1])
            values[f"{group}_AP50"] = _mean(precision[0, :, columns, 0, -1])
    per_category = [(name, _mean(precision[:, :, n, 0, -1])) for n, name in enumerate(truth.names)]
    return Figures(values, tuple(per_category))


def _mean(values: Any) -> float:
    """Of the entries for which there was something to find (pycocotools marks the others with -1)."""
    counted = values[values > -1]
    return float(counted.mean()) if counted.size else float("nan")


def precision_and_recall(
    truth: CocoTruth, answers: Iterable[ImageAnswer], max_detections: Sequence[int], areas: Sequence[str] = AREAS
) -> tuple[Array, Array]:
    """pycocotools' precision (T, R, C, A, M) and recall (T, C, A, M), -1 where there is nothing to find.

    Axes: T IoU thresholds, R recalls, C categories in the order of `truth`, A `areas`, M `max_detections`.
    """
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports on every step
        ground_truth = _index(truth.document, [_complete(one) for one in truth.document["annotations"]])
        image_ids, parts = [], []
        for group in _groups(answers, ground_truth.getImgIds()):
            part = COCOeval(ground_truth, _results(truth, group), "bbox")
            _configure(part.params, truth.category_ids, max_detections, areas)
            part.params.imgIds = [answer.image_id for answer in group]
            part.evaluate()
            parts.append(_as_array(part.evalImgs, (len(truth.category_ids), len(areas), len(group))))
            image_ids += list(part.params.imgIds)  # evaluate() has sorted them
        # Boxes of equal score rank by image id, however the answers came.
        evaluated = np.concatenate(parts, axis=2)[:, :, np.argsort(image_ids)]
        total = COCOeval(iouType="bbox")
        _configure(total.params, truth.category_ids, max_detections, areas)
        total.params.imgIds = sorted(image_ids)
        total._paramsEval, total.evalImgs = total.params, evaluated.ravel().tolist()
        total.accumulate()
    in_order = [sorted(truth.category_ids).index(category) for category in truth.category_ids]
    return total.eval["precision"][:, :, in_order], total.eval["recall"][:, in_order]


def _configure(params: Any, category_ids: Sequence[int], max_detections: Sequence[int], areas: Sequence[str]) -> None:
    chosen = [place for place, area in enumerate(params.areaRngLbl) if area in areas]
    params.areaRng = [params.areaRng[place] for place in chosen]
    params.areaRngLbl = [params.areaRngLbl[place] for place in chosen]
    params.catIds, params.maxDets = sorted(category_ids), list(max_detections)


def _groups(answers: Iterable[ImageAnswer], image_ids: Sequence[int]) -> Iterator[list[ImageAnswer]]:
    """The answers, `IMAGES_AT_ONCE` together, then one without boxes for each image that has no answer."""
    missing = dict.fromkeys(image_ids)  # an ordered set

    def all_answers() -> Iterator[ImageAnswer]:
        for answer in answers:
            if answer.image_id not in missing:
                raise ValueError(f"image {answer.image_id} is answered twice, or not in the annotation file")
            del missing[answer.image_id]
            yield answer
        nothing = np.zeros(0, np.int64)
        yield from (ImageAnswer(image_id, np.zeros((0, 4)), np.zeros(0), nothing) for image_id in list(missing))

    yield from batched(all_answers(), IMAGES_AT_ONCE)


def batched(items: Iterable[ImageAnswer], size: int) -> Iterator[list[ImageAnswer]]:
    """Lists of `size`, the last one shorter."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


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

    indexed = COCO()
    indexed.dataset = {**document, "annotations": annotations}
    indexed.createIndex()
    return indexed


def _as_array(items: Sequence[Any], shape: tuple[int, ...]) -> Array:
    result = np.empty(len(items), dtype=object)
    result[:] = items
    return result.reshape(shape)
