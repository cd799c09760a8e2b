"""Logits and boxes -> detections of one image (mmdet `dense_heads/grounding_dino_head.py::_predict_by_feat_single`).

Pure tensor functions. Axes: Q queries, T text tokens, C categories, K detections.
"""

import torch
from torch import Tensor

from groundingdino import boxes as box_ops
from groundingdino.inputs.images import ImageGeometry


def category_scores(logits: Tensor, positive_map: Tensor) -> Tensor:
    """Mean of the sigmoids over each category's tokens.

    Args:
        logits: (..., Q, T).
        positive_map: (C, T) bool, True where a token names the category. A category without tokens scores 0.

    Returns:
        (..., Q, C) in [0, 1].
    """
    weight = positive_map.to(logits.dtype)
    weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1)
    return logits.sigmoid() @ weight.mT


def referring_scores(logits: Tensor) -> Tensor:
    """Best token of the sentence, special tokens included (mmdet's protocol for referring expressions).

    logits (..., Q, T), -inf at padding -> (..., Q) in [0, 1].
    """
    return logits.amax(dim=-1).sigmoid()


def top_detections(scores: Tensor, boxes: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best query-category pairs; one box may appear under several categories.

    Args:
        scores: (Q, C), or (Q,) in referring mode.
        boxes: (Q, 4).

    Returns:
        boxes (K, 4), scores (K,) in falling order, labels (K,) int64; K = min(top_k, Q * C).
    """
    categories = scores.shape[1] if scores.dim() == 2 else 1
    best = scores.flatten().topk(min(top_k, scores.numel()))
    query = torch.div(best.indices, categories, rounding_mode="floor")
    return boxes[query], best.values, best.indices % categories


def to_image_frame(boxes: Tensor, geometry: ImageGeometry) -> Tensor:
    """The boxes in pixels of the original image; clipped to the resized image before the scale is undone, as in mmdet.

    Args:
        boxes: (..., 4) cxcywh in [0, 1] of the resized image.
        geometry: how the image was resized.

    Returns:
        (..., 4) xyxy.
    """
    height, width = geometry.size
    extent = boxes.new_tensor([width, height, width, height])
    corners = (box_ops.cxcywh_to_xyxy(boxes) * extent).clamp(min=0)
    return torch.minimum(corners, extent) / boxes.new_tensor([*geometry.scale_factor, *geometry.scale_factor])
