"""Detections as supervision's own class."""

import numpy as np
import pytest
from detections import FOUND, NOTHING


def test_supervision_gets_its_own_type_with_names_and_class_ids():
    supervision = pytest.importorskip("supervision")
    from groundingdino import to_supervision

    converted = to_supervision(FOUND)
    assert type(converted) is supervision.Detections
    np.testing.assert_array_equal(converted.xyxy, FOUND.boxes.numpy())
    assert converted.class_id.tolist() == [1, 0] and converted.confidence.tolist() == [0.75, 0.5]
    assert converted.data["class_name"].tolist() == ["dog", "cat"]
    assert len(to_supervision(NOTHING)) == 0
