"""Detections as plain data: JSON rows and COCO results. Other tools' own classes: `groundingdino/integrations`."""

from collections.abc import Sequence
from typing import Any

from groundingdino.structures import Detections


def to_json(detections: Detections) -> list[dict[str, Any]]:
    """Plain data, one entry a detection: box [x1, y1, x2, y2] in pixels, score, label, name and, if any, spans."""
    rows = []
    for index, (box, score, label) in enumerate(_rows(detections)):
        row = {"box": [round(x, 2) for x in box], "score": round(score, 5), "label": label}
        row["name"] = detections.names[index]
        if detections.spans is not None:
            row["spans"] = [list(span) for span in detections.spans[index]]
        rows.append(row)
    return rows


def to_coco(detections: Detections, image_id: int, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """COCO result entries: bbox [x, y, width, height] in pixels.

    Args:
        image_id: of the annotation file.
        category_ids: the annotation file's id for each label; without it the label itself.
    Raises:
        ValueError: if a label has no category id.
    """
    results = []
    for (x1, y1, x2, y2), score, label in _rows(detections):
        if category_ids is not None and label >= len(category_ids):
            raise ValueError(f"label {label} has no category id: {len(category_ids)} were given")
        results.append({
            "image_id": image_id,
            "category_id": label if category_ids is None else int(category_ids[label]),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        })  # fmt: skip
    return results


def _rows(detections: Detections) -> list[tuple[list[float], float, int]]:
    boxes, scores, labels = detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist()
    return list(zip(boxes, scores, labels, strict=True))
