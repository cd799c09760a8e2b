"""The losses of MM-Grounding-DINO: focal, L1 and GIoU for every decoder layer, the proposals and the denoising queries.

(mmdet `dense_heads/{dino_head,grounding_dino_head}.py`.) All layers are computed at once.
Axes: R answers (decoder layers, then the proposals), B images, Q queries, T text tokens, N objects, G denoising groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from groundingdino import boxes as box_ops
from groundingdino import distributed
from groundingdino.model import DenoisingOutput, DetectorOutput
from groundingdino.structures import Prediction, Targets
from groundingdino.training.matcher import FOCAL_ALPHA, PIXELS, match

CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 1.0, 5.0, 2.0
EMPTY_LOGIT = -1e4  # stands in for -inf at text padding: probability 0 and loss 0, where -inf would give NaN


def stack(predictions: Sequence[Prediction]) -> tuple[Tensor, Tensor]:
    """Predictions of equal shape -> logits (R, B, Q, T) and boxes (R, B, Q, 4)."""
    return torch.stack([p.logits for p in predictions]), torch.stack([p.boxes for p in predictions])


def focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """(R, ..., T) logits and 0/1 targets -> (R,) sums (Lin et al. 2017)."""
    loss = sigmoid_focal_loss(logits.clamp(min=EMPTY_LOGIT), wanted, alpha=FOCAL_ALPHA, gamma=2, reduction="none")
    return loss.flatten(1).sum(dim=1)


def box_losses(boxes: Tensor, wanted: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(R, ..., 4) cxcywh predicted, wanted and (R, ...) 0/1 weights -> L1 and GIoU losses, (R,) sums each."""
    l1 = (boxes - wanted).abs() * weight[..., None]
    giou = box_ops.giou(box_ops.cxcywh_to_xyxy(boxes) * PIXELS, box_ops.cxcywh_to_xyxy(wanted) * PIXELS)
    return l1.flatten(1).sum(dim=1), ((1 - giou) * weight).flatten(1).sum(dim=1)


class Criterion(nn.Module):
    """DetectorOutput and Targets -> weighted loss terms under mmdet's names."""

    def normalizers(self, batches: Sequence[Targets], queries: int, groups: Sequence[int]) -> Tensor:
        """(3,) matched objects, shown objects (each at least 1 in all), and whether any was shown, 1 or 0.

        The counts of all micro-batches (`groups` has one number for each) and processes, divided by the number of
        micro-batches and processes, as their gradients will be. mmdet takes at least 1 of that mean; then a process
        without objects would change what the others learn.
        """
        matched = sum(min(count, queries) for targets in batches for count in targets.counts)
        shown = sum(sum(targets.counts) * number for targets, number in zip(batches, groups, strict=True))
        boxes = batches[0].boxes
        total = distributed.all_reduce_sum(torch.stack([boxes.new_full((), matched), boxes.new_full((), shown)]))
        share = len(batches) * distributed.world_size()
        return torch.cat((total.clamp(min=1) / share, total[1:].clamp(max=1)))

    def forward(self, output: DetectorOutput, targets: Targets, normalizers: Tensor | None = None) -> dict[str, Tensor]:
        """Every term as a weighted scalar; their sum is the loss.

        `loss_cls`, `loss_bbox` and `loss_iou` are the last decoder layer's, `d0.` ... the earlier ones', `enc_` the
        proposals'; `dn_` the same for the denoising queries. `normalizers` replaces this batch's own (gradient
        accumulation).
        """
        denoising = output.denoising
        if denoising is None:
            raise ValueError("the detector was run without targets: pass them to its forward to train")
        if normalizers is None:
            normalizers = self.normalizers([targets], output.proposals.boxes.shape[1], [denoising.groups])
        layers = len(output.layers)
        prefixes = [*(f"d{i}." for i in range(layers - 1)), ""]
        terms = self.matching_terms(output, targets, normalizers[0]).unbind()
        names = [f"{prefix}{kind}" for prefix in (*prefixes, "enc_") for kind in ("loss_cls", "loss_bbox", "loss_iou")]
        dn_terms = (self.denoising_terms(denoising, targets, normalizers[1]) * normalizers[2]).unbind()
        dn_names = [f"{prefix}dn_{kind}" for prefix in prefixes for kind in ("loss_cls", "loss_bbox", "loss_iou")]
        return dict(zip((*names, *dn_names), (*terms, *dn_terms), strict=True))

    def matching_terms(self, output: DetectorOutput, targets: Targets, normalizer: Tensor) -> Tensor:
        """(R * 3,) weighted terms of the decoder layers and the proposals."""
        logits, boxes = stack((*output.layers, output.proposals))
        matched = match(logits, boxes, targets)  # (R, B, N)
        answers, batch, queries, tokens = logits.shape
        named = targets.positive_map.to(logits.dtype).expand(answers, -1, -1, -1)
        wanted = logits.new_zeros(answers, batch, queries + 1, tokens)  # the last row takes what matched nobody
        wanted = wanted.scatter(2, matched[..., None].expand(-1, -1, -1, tokens), named)[:, :, :queries]
        index = matched.clamp(max=queries - 1)[..., None].expand(-1, -1, -1, 4)
        weight = (matched < queries).to(boxes.dtype)
        l1, giou = box_losses(boxes.gather(2, index), targets.boxes.expand(answers, -1, -1, -1), weight)
        return self.weighted(focal_loss(logits, wanted), l1, giou, normalizer)

    def denoising_terms(self, denoising: DenoisingOutput, targets: Targets, normalizer: Tensor) -> Tensor:
        """(R * 3,) weighted terms: queries with little noise are to restore their object, the others to name nothing.

        Queries that stand for padding count as naming nothing, as in mmdet; without any object on any process the
        caller multiplies by 0.
        """
        logits, boxes = stack(denoising.layers)
        layout = (denoising.groups, 2, targets.boxes.shape[1])
        logits, boxes = logits.unflatten(2, layout), boxes.unflatten(2, layout)  # (R, B, G, 2, N, ...)
        named = targets.positive_map[:, None].to(logits.dtype)  # (B, 1, N, T)
        wanted = torch.stack((named, torch.zeros_like(named)), dim=2).expand_as(logits)
        restored = boxes[:, :, :, 0]
        weight = targets.valid[:, None].to(boxes.dtype).expand(restored.shape[:-1])
        l1, giou = box_losses(restored, targets.boxes[:, None].expand_as(restored), weight)
        return self.weighted(focal_loss(logits, wanted), l1, giou, normalizer)

    def weighted(self, focal: Tensor, l1: Tensor, giou: Tensor, normalizer: Tensor) -> Tensor:
        """Three (R,) sums -> (R * 3,) terms."""
        return torch.stack((CLASS_WEIGHT * focal, L1_WEIGHT * l1, GIOU_WEIGHT * giou), dim=1).flatten() / normalizer
