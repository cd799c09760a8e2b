"""Logits and boxes -> detections of one image (mmdet `dense_heads/grounding_dino_head.py::_predict_by_feat_single`).

Pure tensor functions. Axes: Q queries, T text tokens, C categories, K detections.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from groundingdino import boxes as box_ops
from groundingdino.inference.vocabulary import PromptRoles
from groundingdino.inputs.images import ImageGeometry

SAME_OBJECT = 0.7  # IoU over which two boxes of one vocabulary entry, or of it and its negative, are one object

# LLMDet `detectors/grounding_dino.py::predict`
SIDE_BONUS = 0.7  # of a box whose centre is at the named border
SIDE_CANDIDATES = 30  # boxes that get one


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


def fold(boxes: Tensor, scores: Tensor, labels: Tensor, roles: PromptRoles) -> tuple[Tensor, Tensor]:
    """The rows of a vocabulary's texts that are reported, and the name of each.

    A text's boxes are those of the name whose prompt it is. A name's box goes where one of its negatives has a better
    box of the same object; of what an ensemble finds, the best box of each object stays (`SAME_OBJECT`).

    Args:
        boxes: (K, 4) xyxy.
        scores: (K,) falling.
        labels: (K,) int64, index of the text.

    Returns:
        rows (M,) int64, rising, and names (M,) int64.
    """
    names = torch.tensor(roles.owners)[labels]
    kept = names >= 0
    for name, negatives in roles.rivals:
        own, others = (names == name).nonzero()[:, 0], torch.isin(labels, torch.tensor(negatives)).nonzero()[:, 0]
        better = scores[others][None] > scores[own][:, None]
        same = box_ops.iou(boxes[own][:, None], boxes[others][None]) > SAME_OBJECT
        kept[own[(better & same).any(dim=1)]] = False
    if roles.ensembles:
        rows = (kept & torch.isin(names, torch.tensor(roles.ensembles))).nonzero()[:, 0]
        kept[rows] = False
        kept[rows[suppress(boxes[rows], scores[rows], names[rows], SAME_OBJECT)]] = True
    found = kept.nonzero()[:, 0]
    return found, names[found]


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor | None, iou: float) -> Tensor:
    """Rows that non-maximum suppression keeps, best first; between equal labels, or between all where None."""
    from torchvision.ops import batched_nms, nms  # a second's import that few calls need

    return nms(boxes, scores, iou) if labels is None else batched_nms(boxes, scores, labels, iou)


def side_bonus(boxes: Tensor, sides: Sequence[str], geometry: ImageGeometry) -> Tensor:
    """What LLMDet adds to the scores of boxes for the sides that an expression names.

    LLMDet adds 1 more for each side, which changes no order within an expression.

    Args:
        boxes: (K, 4) xyxy in pixels of the original image.
        sides: one or more of "left", "right", "top", "bottom".

    Returns:
        (K,) for each side from 0 at the opposite border to SIDE_BONUS at the named one, summed.
    """
    height, width = geometry.size
    x = (boxes[:, 0] + boxes[:, 2]) / 2 * geometry.scale_factor[0] / width
    y = (boxes[:, 1] + boxes[:, 3]) / 2 * geometry.scale_factor[1] / height
    nearness = {"left": 1 - x, "right": x, "top": 1 - y, "bottom": y}
    return SIDE_BONUS * torch.stack([nearness[side] for side in sides]).sum(dim=0)
