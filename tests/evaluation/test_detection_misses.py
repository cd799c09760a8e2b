"""What is drawn of a protocol's answers."""

import numpy as np

from groundingdino.evaluation.detection_misses import as_detections


def test_each_drawn_box_bears_the_name_of_its_label():
    boxes = np.array([[0, 0, 10, 10], [5, 5, 20, 20], [1, 1, 4, 4]])
    drawn = as_detections(boxes, np.array([0.9, 0.5, 0.4]), np.array([2, 0, 2]), ("cat", "dog", "bird"))
    assert drawn.names == ("bird", "cat", "bird") and drawn.labels.tolist() == [2, 0, 2]
    assert drawn.boxes.tolist() == boxes.tolist()
    nothing = as_detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), ("cat",))
    assert nothing.names == () and nothing.boxes.shape == (0, 4)
