"""Detections as FiftyOne's own class."""

import pytest
from detections import FOUND, NOTHING, SIZE

fiftyone = pytest.importorskip("fiftyone")


def test_fiftyone_gets_its_detections_with_relative_boxes():
    from groundingdino.integrations.fiftyone import to_fiftyone

    converted = to_fiftyone(FOUND, SIZE)
    assert type(converted) is fiftyone.Detections
    dog, cat = converted.detections
    assert (dog.label, dog.confidence, cat.label, cat.confidence) == ("dog", 0.75, "cat", 0.5)
    assert dog.bounding_box == pytest.approx([1 / 40, 2 / 50, 10 / 40, 20 / 50])
    sample = fiftyone.Sample(filepath="photo.jpg", predictions=converted)
    assert [d["label"] for d in sample.to_dict()["predictions"]["detections"]] == ["dog", "cat"]
    assert to_fiftyone(NOTHING, SIZE).detections == []
