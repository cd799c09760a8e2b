"""Detections for roboflow's supervision."""

import numpy as np
import supervision

from groundingdino.structures import Detections


def to_supervision(found: Detections) -> supervision.Detections:
    """A `supervision.Detections` with `class_id` = label and the names in `data["class_name"]`."""
    return supervision.Detections(
        xyxy=found.boxes.numpy().astype(np.float32).reshape(-1, 4),
        confidence=found.scores.numpy().astype(np.float32),
        class_id=found.labels.numpy().astype(int),
        data={"class_name": np.array(found.names, dtype=str)},
    )
