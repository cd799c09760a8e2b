"""LVIS figures against `lvis` 0.5.3 and mmdet's LVISFixedAPMetric."""

import random

import pytest
from protocol_files import answers, load

from groundingdino.evaluation import lvis

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def truth() -> lvis.LvisTruth:
    return lvis.LvisTruth.from_document(load("lvis", "annotations.json"))


@pytest.mark.parametrize(
    ("reference", "selection", "arguments"),
    [
        ("lvis_api", lvis.StandardSelection, {}),
        ("mmdet_fixed_ap", lvis.FixedSelection, {}),
        ("mmdet_fixed_ap_topk3", lvis.FixedSelection, {"per_category": 3}),
        ("mmdet_fixed_ap_topk12", lvis.FixedSelection, {"per_category": 12}),
    ],
)
def test_figures_equal_the_reference(truth, reference, selection, arguments):
    chosen = selection(truth, **arguments)
    for answer in answers("lvis"):
        chosen.add(answer)
    figures = lvis.figures(truth, chosen.categories(), with_recall=reference == "lvis_api")
    expected = load("lvis", "result.json")[reference]
    assert figures.values == pytest.approx(expected, abs=TOLERANCE)


def test_score_gives_fixed_and_standard_figures(truth):
    expected = load("lvis", "result.json")
    values = lvis.score(truth, answers("lvis")).values
    assert {name: values[name] for name in expected["mmdet_fixed_ap"]} == pytest.approx(
        expected["mmdet_fixed_ap"], abs=TOLERANCE
    )
    standard = {name: values[f"standard {name}"] for name in expected["lvis_api"]}
    assert standard == pytest.approx(expected["lvis_api"], abs=TOLERANCE)


def test_neither_the_order_of_images_nor_the_size_of_batches_changes_a_figure(truth, monkeypatch):
    together = lvis.score(truth, answers("lvis"))
    monkeypatch.setattr(lvis, "ROWS_AT_ONCE", 50)
    shuffled = answers("lvis")
    random.Random(0).shuffle(shuffled)
    assert lvis.score(truth, shuffled) == together


def test_of_equal_scores_the_fixed_selection_keeps_the_lower_image_id(truth):
    chosen = lvis.FixedSelection(truth, per_category=2)
    one = answers("lvis")[0]
    for image_id in reversed(truth.image_ids[:4].tolist()):
        box, label = one.boxes[:1], one.labels[:1]
        chosen.add(lvis.ImageAnswer(image_id, box, one.scores[:1] * 0 + 0.5, label))
    chosen._sort_in()  # `categories` would leave out images that say nothing about the category
    kept = [rows for rows in chosen.kept if len(rows.scores)]
    assert [rows.images.tolist() for rows in kept] == [[0, 1]]


def test_an_image_that_is_not_annotated_is_refused(truth):
    with pytest.raises(ValueError, match="image 5 is not in the annotation file"):
        lvis.score(truth, [lvis.ImageAnswer(5, *[answers("lvis")[0].boxes[:0]] * 3)])
