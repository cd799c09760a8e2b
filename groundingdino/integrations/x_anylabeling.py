"""Detections for X-AnyLabeling: shapes of its label files, and what its remote-server client reads."""

import re
from typing import Any

from groundingdino.structures import Detections

LABEL_FILE_VERSION = "4.2.1"  # of X-AnyLabeling, whose files look like this
# What its panel shows, and the values that it begins with: a prompt, two thresholds, whether to keep what is there
WIDGETS = {
    "edit_text": None, "button_send": None, "input_conf": None, "edit_conf": 0.3, "input_iou": None, "edit_iou": 0.8,
    "toggle_preserve_existing_annotations": False,
}  # fmt: skip


def shapes(found: Detections) -> list[dict[str, Any]]:
    """One rectangle a detection, as its four corners in pixels, clockwise from the upper left one."""
    return [
        {
            "label": name,
            "score": score,
            "shape_type": "rectangle",
            "points": [[x1, y1], [x2, y1], [x2, y2], [x1, y2]],
        }
        for name, score, (x1, y1, x2, y2) in zip(found.names, found.scores.tolist(), found.boxes.tolist(), strict=True)
    ]


def to_x_anylabeling(found: Detections, image_name: str, size: tuple[int, int]) -> dict[str, Any]:
    """The label file to write as `NAME.json` beside the image `image_name`; `size` is (width, height) in pixels."""
    return {
        "version": LABEL_FILE_VERSION,
        "shapes": shapes(found),
        "imagePath": image_name,
        "imageData": None,
        "imageHeight": size[1],
        "imageWidth": size[0],
    }


def model_entry(display_name: str) -> dict[str, Any]:
    """A model in the answer to `/v1/models`."""
    return {
        "display_name": display_name,
        "widgets": [{"name": name, "value": value} for name, value in WIDGETS.items()],
        "batch_processing_mode": "text_prompt",
    }


def ask(params: dict[str, Any]) -> dict[str, Any]:
    """The client's `params` as fields of the server's question; thresholds of 0 are those that nobody has set."""
    names = [name.strip() for name in re.split("[,.]", str(params.get("text_prompt", ""))) if name.strip()]
    threshold, nms = params.get("conf_threshold") or None, params.get("iou_threshold") or None
    return {"categories": names, "threshold": threshold, "nms": nms}
