"""COCO figures against pycocotools and mmdet's CocoMetric."""

import math
import random

import numpy as np
import pytest
from protocol_files import answers, load

from groundingdino.evaluation import coco

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def truth() -> coco.CocoTruth:
    return coco.CocoTruth.from_document(load("coco", "annotations.json"))


def test_the_twelve_figures_equal_pycocotools(truth):
    figures = coco.score(truth, answers("coco"))
    assert list(figures.values.values()) == pytest.approx(
        load("coco", "result.json")["pycocotools_stats"], abs=TOLERANCE
    )


def test_ap_of_each_category_equals_the_reference(truth):
    figures = coco.score(truth, answers("coco"))
    expected = load("coco", "result.json")["per_category_AP"]
    got = {name: None if math.isnan(value) else value for name, value in figures.per_category}
    assert got == {
        name: value if value is None else pytest.approx(value, abs=TOLERANCE) for name, value in expected.items()
    }


def test_neither_the_order_of_images_nor_the_size_of_batches_changes_a_figure(truth, monkeypatch):
    together = coco.score(truth, answers("coco"))
    monkeypatch.setattr(coco, "IMAGES_AT_ONCE", 3)
    shuffled = answers("coco")
    random.Random(0).shuffle(shuffled)
    assert coco.score(truth, shuffled) == together


def test_an_image_without_an_answer_counts_as_answered_with_no_box(truth):
    some = answers("coco")[:5]
    nothing = [
        coco.ImageAnswer(answer.image_id, np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
        for answer in answers("coco")[5:]
    ]
    assert coco.score(truth, some) == coco.score(truth, some + nothing)
    assert coco.score(truth, some).values["AR@100"] < coco.score(truth, answers("coco")).values["AR@100"]


def test_an_image_that_is_answered_twice_is_refused(truth):
    with pytest.raises(ValueError, match="image 1000 is answered twice, or not in the annotation file"):
        coco.score(truth, answers("coco")[:1] * 2)


def test_base_and_novel_categories_average_to_their_own_figures(truth):
    document = load("coco", "annotations.json")
    split = coco.CategorySplit(base=("person", "cat"), novel=("hair drier",))
    figures = coco.score(coco.CocoTruth.from_document(document, split), relabelled(document, split))
    alone = dict(coco.score(truth, answers("coco")).per_category)
    assert [name for name, _ in figures.per_category] == ["person", "hair drier", "cat"]
    assert figures.values["base_AP"] == pytest.approx((alone["person"] + alone["cat"]) / 2, abs=TOLERANCE)
    assert figures.values["novel_AP"] == pytest.approx(alone["hair drier"], abs=TOLERANCE)
    assert figures.values["AP"] == pytest.approx(
        (alone["person"] + alone["cat"] + alone["hair drier"]) / 3, abs=TOLERANCE
    )


def relabelled(document, split) -> list[coco.ImageAnswer]:
    """The golden answers about the categories of a split, numbered among these."""
    names = [category["name"] for category in document["categories"]]
    wanted = [label for label, name in enumerate(names) if name in {*split.base, *split.novel}]
    number = {label: place for place, label in enumerate(wanted)}
    result = []
    for one in answers("coco"):
        rows = np.isin(one.labels, wanted)
        labels = np.array([number[label] for label in one.labels[rows].tolist()], dtype=int)
        result.append(coco.ImageAnswer(one.image_id, one.boxes[rows], one.scores[rows], labels))
    return result


def test_a_split_that_the_file_does_not_hold_is_refused():
    with pytest.raises(ValueError, match="lacks categories of the split: airplane, apple"):
        coco.CocoTruth.from_document(load("coco", "annotations.json"), coco.CategorySplit())


def test_the_open_vocabulary_split_has_48_and_17_categories():
    assert (len(set(coco.BASE_48)), len(set(coco.NOVEL_17))) == (48, 17)
    assert not set(coco.BASE_48) & set(coco.NOVEL_17)


def test_boxes_of_equal_score_rank_by_image_id_however_the_answers_come():
    images = [{"id": number, "file_name": f"{number}.jpg", "width": 50, "height": 50} for number in (1, 2)]
    objects = [{"id": n, "image_id": n, "category_id": 1, "bbox": [5, 5, 20, 20]} for n in (1, 2)]
    document = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "cat"}]}
    wrong, right = (
        coco.ImageAnswer(number, np.array([box], float), np.array([0.5]), np.zeros(1, int))
        for number, box in ((1, [30, 30, 49, 49]), (2, [5, 5, 25, 25]))
    )
    truth = coco.CocoTruth.from_document(document)
    first, second = (coco.score(truth, order).values["AP"] for order in ([wrong, right], [right, wrong]))
    assert first == second == pytest.approx(51 / 101 / 2)  # one of two objects, behind a mistake
