"""One-to-one matching of predictions to objects, all layers and images with a single read from the device.

(DETR section 3.1; mmdet `task_modules/assigners/{hungarian_assigner,match_cost}.py`.)
Axes: R answers (decoder layers and proposals), B images, Q queries, T text tokens, N objects.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from groundingdino import boxes as box_ops
from groundingdino.runtime import devices
from groundingdino.structures import Targets

CLASS_COST, L1_COST, GIOU_COST = 2.0, 5.0, 2.0
FOCAL_ALPHA, FOCAL_EPS = 0.25, 1e-12
# mmdet measures IoU in pixels. A change of scale leaves it as it is, but for the eps against empty boxes, which is
# as large as a small real box in units of the whole image.
PIXELS = 1000.0


def matching_cost(logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
    """logits (R, B, Q, T), boxes (R, B, Q, 4) cxcywh -> cost (R, B, Q, N).

    Text padding has logits of -inf and no place in the positive map, so it costs nothing.
    """
    p = logits.sigmoid()
    named = targets.positive_map.mT.to(p.dtype)  # (B, T, N)
    present = -(p + FOCAL_EPS).log() * FOCAL_ALPHA * (1 - p).square()
    absent = -(1 - p + FOCAL_EPS).log() * (1 - FOCAL_ALPHA) * p.square()
    class_cost = present @ named + absent @ (1 - named)
    l1_cost = torch.cdist(boxes, targets.boxes.expand(len(boxes), -1, -1, -1), p=1)
    predicted = box_ops.cxcywh_to_xyxy(boxes)[..., :, None, :] * PIXELS
    wanted = box_ops.cxcywh_to_xyxy(targets.boxes)[..., None, :, :] * PIXELS
    giou_cost = -box_ops.giou(predicted, wanted)
    return CLASS_COST * class_cost + L1_COST * l1_cost + GIOU_COST * giou_cost


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
    """The query that each object is matched to, (R, B, N) int64 on the device of the logits.

    Q ("nobody") stands for padded objects, and for objects that found no query where there are more objects than
    queries. Costs that are not finite count as very high, so that a diverged step ends in a loss that says so.
    """
    answers, batch, queries, _ = logits.shape
    cost = np.nan_to_num(matching_cost(logits, boxes, targets).cpu().numpy(), nan=1e9, posinf=1e9, neginf=1e9)
    matched = np.full((answers, batch, targets.boxes.shape[1]), queries, dtype=np.int64)
    for answer in range(answers):
        for image, count in enumerate(targets.counts):
            query, objects = linear_sum_assignment(cost[answer, image, :, :count])
            matched[answer, image, objects] = query
    return devices.send(torch.from_numpy(matched), logits.device)
