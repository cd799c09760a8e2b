"""Logits and boxes -> detections of one image (mmdet `dense_heads/grounding_dino_head.py::_predict_by_feat_single`).

Pure tensor functions. Axes: Q queries, T text tokens, C categories, K detections.
"""

import torch
from torch import Tensor

from groundingdino import boxes as box_ops


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


def to_image_frame(boxes: Tensor, size: tuple[int, int], scale_factor: tuple[float, float]) -> Tensor:
    """Boxes as the detector gives them -> pixels of the original image.

    Args:
        boxes: (..., 4) cxcywh in [0, 1] of the resized image.
        size: (height, width) of the resized image.
        scale_factor: resized / original, (x, y).

    Returns:
        (..., 4) xyxy; clipped to the resized image before the scale is undone, as in mmdet.
    """
    height, width = size
    extent = boxes.new_tensor([width, height, width, height])
    corners = (box_ops.cxcywh_to_xyxy(boxes) * extent).clamp(min=0)
    return torch.minimum(corners, extent) / boxes.new_tensor([*scale_factor, *scale_factor])
