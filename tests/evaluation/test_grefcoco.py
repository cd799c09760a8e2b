"""gRefCOCO figures against mmdet's gRefCOCOMetric."""

import numpy as np
import pytest
from protocol_files import answers, load

from groundingdino.evaluation import grefcoco
from groundingdino.evaluation.answers import xywh_to_xyxy

TOLERANCE = 1e-6


def truth() -> grefcoco.GrefcocoTruth:
    return grefcoco.GrefcocoTruth.from_document(load("grefcoco", "annotations.json"))


def test_figures_equal_mmdet():
    figures = grefcoco.score(truth(), answers("grefcoco"))
    assert figures.values == pytest.approx(load("grefcoco", "result.json"), abs=TOLERANCE)


def test_one_box_finds_one_of_two_equal_targets_only():
    boxes = xywh_to_xyxy([[0, 0, 10, 10], [0, 0, 10, 10]])
    target = grefcoco.GrefcocoTruth({1: boxes})
    one = grefcoco.ImageAnswer(1, boxes[:1], np.array([0.9]), np.zeros(1, int))
    two = grefcoco.ImageAnswer(1, boxes, np.array([0.9, 0.8]), np.zeros(2, int))
    assert grefcoco.score(target, [one]).values["F1_score"] == 0
    assert grefcoco.score(target, [two]).values["F1_score"] == 1


def test_boxes_below_the_threshold_do_not_count():
    target = grefcoco.GrefcocoTruth({1: np.zeros((0, 4))})
    answer = grefcoco.ImageAnswer(1, np.array([[0.0, 0, 9, 9]]), np.array([0.69], np.float32), np.zeros(1, int))
    assert grefcoco.score(target, [answer]).values["N_acc"] == 1
    assert grefcoco.score(target, [answer], threshold=0.5).values["N_acc"] == 0
