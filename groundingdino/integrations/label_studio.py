"""Detections for Label Studio: a prediction, and with its image a task that the importer takes.

task = {"data": {"image": "/data/local-files/?d=photo.jpg"}, "predictions": [to_label_studio(found, image.size)]}
"""

from collections.abc import Sequence
from typing import Any

from groundingdino.structures import Detections


def to_label_studio(
    found: Detections,
    size: tuple[int, int],
    control: tuple[str, str] = ("label", "image"),
    labels: Sequence[str] | None = None,
    model_version: str = "groundingdino",
) -> dict[str, Any]:
    """A prediction for a labelling config with `<RectangleLabels name="label" toName="image">`.

    Args:
        size: (width, height) of the image in pixels.
        control: names of the RectangleLabels and of the Image tag.
        labels: what the config calls each detection; default is its name. Label Studio refuses unknown ones.
        model_version: what Label Studio shows as the prediction's source.
    """
    width, height = size
    regions = []
    for number, (box, score) in enumerate(zip(found.boxes.tolist(), found.scores.tolist(), strict=True)):
        left, top, right, bottom = (
            min(max(100 * side / extent, 0), 100) for side, extent in zip(box, (width, height) * 2, strict=True)
        )
        value = {"x": left, "y": top, "width": right - left, "height": bottom - top, "rotation": 0}
        regions.append({
            "id": f"gd{number}",
            "from_name": control[0],
            "to_name": control[1],
            "type": "rectanglelabels",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": value | {"rectanglelabels": [found.names[number] if labels is None else labels[number]]},
            "score": score,
        })  # fmt: skip
    mean = sum(found.scores.tolist()) / max(len(regions), 1)
    return {"model_version": model_version, "score": mean, "result": regions}
