"""Flickr30k Entities recall against mmdet's Flickr30kMetric (its merged path with the mistyped name corrected)."""

import numpy as np
import pytest
from protocol_data import box, entry, write
from protocol_files import answers, load

from groundingdino.evaluation import flickr30k

TOLERANCE = 1e-6
NAMES = {"1": "R@1", "5": "R@5", "10": "R@10", "-1": "upper bound"}


def test_recall_equals_mmdet():
    truth = flickr30k.FlickrTruth.from_document(load("flickr30k", "annotations.json"))
    values = flickr30k.score(truth, answers("flickr30k")).values
    expected = load("flickr30k", "result.json")
    for way, prefix in (("any_box", ""), ("merged_box", "merged ")):
        got = {rank: values[prefix + name] for rank, name in NAMES.items()}
        assert got == pytest.approx({rank: row["all"] for rank, row in expected[way].items()}, abs=TOLERANCE)


def test_a_phrase_of_two_boxes_is_found_by_one_of_them_or_by_both_merged():
    truth = flickr30k.FlickrTruth({1: (np.array([[0.0, 0, 10, 10], [20, 0, 30, 10]]),)})
    around = flickr30k.ImageAnswer(1, np.array([[0.0, 0, 30, 10]]), np.ones(1), np.zeros(1, int))
    one = flickr30k.ImageAnswer(1, np.array([[0.0, 0, 10, 10]]), np.ones(1), np.zeros(1, int))
    assert [flickr30k.score(truth, [a]).values["R@1"] for a in (around, one)] == [0, 1]
    assert [flickr30k.score(truth, [a]).values["merged R@1"] for a in (around, one)] == [1, 0]


@pytest.mark.parametrize("phrases", [1, 2, 3])
def test_a_caption_may_mark_more_phrases_than_have_boxes_but_not_fewer(phrases, tmp_path):
    image = entry(7, "1.jpg", caption="a man and a red ball", tokens_positive_eval=[[[0, 5]], [[10, 20]]])
    boxes = [box(number, 7, phrase_ids=number) for number in range(phrases)]
    write(tmp_path / "a.json", {"images": [image], "annotations": boxes})
    if phrases == 3:
        with pytest.raises(ValueError, match=r"a\.json: image 7: boxes of 3 phrases, 2 marked"):
            flickr30k.Flickr30k.load(tmp_path / "a.json", tmp_path)
    else:
        (question,) = flickr30k.Flickr30k.load(tmp_path / "a.json", tmp_path).questions()
        assert question.ids == (7,)


def test_phrases_are_numbered_by_their_ids_whatever_the_order_of_their_boxes():
    boxes = [box(number, 7, phrase_ids=number) for number in (1, 0)]
    truth = flickr30k.FlickrTruth.from_document({"images": [entry(7, "1.jpg")], "annotations": boxes})
    x, y, width, height = box(0, 7)["bbox"]
    assert truth.boxes[7][0].tolist() == [[x, y, x + width, y + height]]
