"""The threshold of each name on a small labelled set."""

import pytest
import torch

from groundingdino.inference.label_thresholds import curves
from groundingdino.structures import Detections

PLACES = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])


def curve(scores, places, truth=PLACES[:2]):
    """Of one image with a cat at each of `truth`, and cats found at `places`."""
    scores = torch.tensor(scores)
    found = Detections(PLACES[places], scores, torch.zeros(len(scores), dtype=torch.int64), ("cat",) * len(scores))
    (result,) = curves(["cat"], [({"cat": truth}, found)])
    return result


def test_figures_count_boxes_that_score_at_least_the_threshold():
    found = curve([0.9, 0.75, 0.5], [0, 2, 1])
    assert found.at(0.5) == pytest.approx((2 / 3, 1.0, 4 / 5))
    assert found.at(0.75) == pytest.approx((1 / 2, 1 / 2, 1 / 2)) and found.at(0.8) == pytest.approx((1, 1 / 2, 2 / 3))
    assert found.at(0.95) == (0, 0, 0) and curve([0.9], [0], PLACES[:0]).at(0.5) == (0, 0, 0)


def test_the_best_threshold_is_halfway_to_the_next_lower_score():
    assert curve([0.9, 0.8, 0.4, 0.3], [0, 1, 2, 2]).best() == pytest.approx(0.6)
    assert curve([0.9, 0.8], [0, 1]).best() == pytest.approx(0.4)  # nothing is lower: halfway to 0
    assert curve([0.9, 0.8], [2, 2]).best() is None


def test_boxes_of_one_score_pass_together():
    assert curve([0.9, 0.8, 0.8, 0.2], [0, 1, 2, 2]).best() == pytest.approx(0.5)


def test_an_object_is_found_once_and_by_half_of_its_area():
    twice = curve([0.9, 0.8], [0, 0])
    assert twice.correct.tolist() == [True, False] and twice.objects == 2
    half, less = PLACES[:1] * torch.tensor([1, 1, 0.5, 1]), PLACES[:1] * torch.tensor([1, 1, 0.49, 1])
    assert curve([0.9], [0], half).correct.all() and not curve([0.9], [0], less).correct.any()


def test_the_table_has_a_line_for_each_threshold():
    lines = list(curve([0.9, 0.8], [0, 1]).lines())
    assert lines[0] == "cat: 2 objects, 2 boxes" and len(lines) == 20
    assert lines[1] == "  0.05  precision 100.0%  recall 100.0%  F1 100.0%  " + "#" * 40
    assert lines[-1] == "  0.95  precision   0.0%  recall   0.0%  F1   0.0%"
