"""Detections for FiftyOne: `sample["predictions"] = to_fiftyone(found, image.size)`."""

import fiftyone

from groundingdino.structures import Detections


def to_fiftyone(found: Detections, size: tuple[int, int]) -> fiftyone.Detections:
    """A `fiftyone.Detections`, best first.

    Args:
        size: (width, height) of the image in pixels; FiftyOne's boxes are [left, top, width, height] in [0, 1].
    """
    width, height = size
    return fiftyone.Detections(
        detections=[
            fiftyone.Detection(
                label=name,
                bounding_box=[x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height],
                confidence=score,
            )
            for name, score, (x1, y1, x2, y2) in zip(
                found.names, found.scores.tolist(), found.boxes.tolist(), strict=True
            )
        ]
    )
