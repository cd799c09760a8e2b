"""Boxes as pure functions of tensors whose last axis is 4: `cxcywh` or `xyxy`, in whatever unit the caller uses.

The formulas are DETR's `util/box_ops.py`.
"""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre and size -> corners."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([center - 0.5 * size, center + 0.5 * size], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) corners -> centre and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def area(boxes: Tensor) -> Tensor:
    """(..., 4) xyxy -> (...,)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _overlap_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    width, height = (high - low).clamp(min=0).unbind(dim=-1)
    overlap = width * height
    return overlap, area(a) + area(b) - overlap


def iou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Intersection over union of xyxy boxes, broadcast: pass a[:, None], b[None] for all pairs."""
    overlap, union = _overlap_and_union(a, b)
    return overlap / union.clamp(min=eps)


def giou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Generalised IoU (Rezatofighi et al. 2019) of xyxy boxes, broadcast like `iou`; eps as mmdet `bbox_overlaps`."""
    overlap, union = _overlap_and_union(a, b)
    union = union.clamp(min=eps)
    low = torch.minimum(a[..., :2], b[..., :2])
    high = torch.maximum(a[..., 2:], b[..., 2:])
    width, height = (high - low).clamp(min=0).unbind(dim=-1)
    hull = (width * height).clamp(min=eps)
    return overlap / union - (hull - union) / hull
