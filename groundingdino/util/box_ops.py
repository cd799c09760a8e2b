"""`groundingdino.util.box_ops` of IDEA-Research/GroundingDINO: box formats, and IoU of all pairs."""

from torch import Tensor

from groundingdino import boxes as box_ops


def box_cxcywh_to_xyxy(x: Tensor) -> Tensor:
    """(..., 4) centre and size -> corners."""
    return box_ops.cxcywh_to_xyxy(x)


def box_xyxy_to_cxcywh(x: Tensor) -> Tensor:
    """(..., 4) corners -> centre and size."""
    return box_ops.xyxy_to_cxcywh(x)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """(N, 4) and (M, 4) xyxy -> (N, M)."""
    return box_ops.giou(boxes1[:, None], boxes2[None])
