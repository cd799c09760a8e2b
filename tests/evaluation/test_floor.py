"""Precision@1 of answering without a model."""

import pytest

from groundingdino.data import ReferringExpression
from groundingdino.evaluation.floor import floors

SMALL, LARGE = (45.0, 45, 55, 55), (0.0, 0, 40, 40)


def expression(number: int, box: tuple[float, float, float, float], size=(100, 100)) -> ReferringExpression:
    return ReferringExpression(number, number, "a.jpg", "cup", "refcoco", box, size)


def test_the_largest_box_and_the_one_nearest_the_centre_are_the_answers():
    assert floors([expression(1, SMALL), expression(2, SMALL), expression(3, LARGE)]) == {
        "largest box": {"refcoco": pytest.approx(1 / 3)},
        "centre box": {"refcoco": pytest.approx(2 / 3)},
    }


def test_a_centre_without_an_image_size_is_refused():
    with pytest.raises(ValueError, match="images entry 1: no width and height"):
        floors([expression(1, SMALL, size=None)])


def test_the_centre_is_that_of_both_axes():
    wide, narrow = (0.0, 40, 90, 60), (58.0, 43, 62, 57)  # 5 and 10 pixels from the centre
    found = floors([expression(1, wide), expression(2, wide), expression(3, narrow)])
    assert found["centre box"] == {"refcoco": pytest.approx(2 / 3)}


def test_all_boxes_of_an_image_are_chosen_from():
    others = [expression(3, (50.0, 0, 60, 10)), expression(4, (70.0, 0, 80, 10))]
    found = floors([expression(1, LARGE), expression(2, LARGE), *others])
    assert found["largest box"] == {"refcoco": pytest.approx(2 / 4)}
