"""The losses of MM-Grounding-DINO: focal, L1 and GIoU for every decoder layer, the proposals and the denoising queries.

(mmdet `dense_heads/{dino_head,grounding_dino_head}.py`.) All layers are computed at once.
Axes: R answers (decoder layers, then the proposals), B images, Q queries, T text tokens, N objects, G denoising groups.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from groundingdino import boxes as box_ops
from groundingdino.model import DetectorOutput
from groundingdino.runtime import distributed
from groundingdino.structures import Prediction, Targets
from groundingdino.training.matcher import FOCAL_ALPHA, PIXELS, match

WEIGHTS = {"loss_cls": 1.0, "loss_bbox": 5.0, "loss_iou": 2.0}
EMPTY_LOGIT = -1e4  # stands in for -inf at text padding: probability 0 and loss 0, where -inf would give NaN


def stack(predictions: Sequence[Prediction]) -> tuple[Tensor, Tensor]:
    """Predictions of equal shape -> logits (R, B, Q, T) and boxes (R, B, Q, 4)."""
    return torch.stack([p.logits for p in predictions]), torch.stack([p.boxes for p in predictions])


def sums(values: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """A flat tensor made of blocks of R * n values each -> the (R,) sums of every block."""
    blocks = values.split([answers * size for answers, size in sizes])
    return [block.view(answers, size).sum(dim=1) for block, (answers, size) in zip(blocks, sizes, strict=True)]


def focal_losses(parts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Pairs of (R, ...) logits and 0/1 targets -> (R,) sums (Lin et al. 2017)."""
    logits, wanted = (torch.cat([x.flatten() for x in column]) for column in zip(*parts, strict=True))
    loss = sigmoid_focal_loss(logits.clamp(min=EMPTY_LOGIT), wanted, alpha=FOCAL_ALPHA, gamma=2, reduction="none")
    return sums(loss, [(len(x), x[0].numel()) for x, _ in parts])


def box_losses(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Triples of (R, ..., 4) cxcywh predicted, the same wanted, and (R, ...) 0/1 weights -> (R,) sums, L1 and GIoU."""
    columns = list(zip(*parts, strict=True))
    boxes, wanted = (torch.cat([x.reshape(-1, 4) for x in column]) for column in columns[:2])
    weight = torch.cat([x.flatten() for x in columns[2]])
    l1 = (boxes - wanted).abs().sum(dim=-1) * weight
    giou = box_ops.giou(box_ops.cxcywh_to_xyxy(boxes) * PIXELS, box_ops.cxcywh_to_xyxy(wanted) * PIXELS)
    sizes = [(len(x), x[0].numel()) for x in columns[2]]
    return sums(l1, sizes), sums((1 - giou) * weight, sizes)


class Normalizers(NamedTuple):
    """What losses are divided by, on the host."""

    matched: float  # objects that queries are matched to, at least 1 in all
    shown: float  # objects that denoising queries show, at least 1 in all
    any_shown: float  # 1, or 0 where no object was shown


class Criterion(nn.Module):
    """DetectorOutput and Targets -> weighted loss terms under mmdet's names.

    `class_weight` is the weight of every classification term; the default is mmdet's.
    """

    def __init__(self, class_weight: float = WEIGHTS["loss_cls"]) -> None:
        super().__init__()
        self.weights = {**WEIGHTS, "loss_cls": class_weight}

    def normalizers(self, batches: Sequence[Targets], queries: int, groups: Sequence[int]) -> Normalizers:
        """The counts of all micro-batches and processes, divided by the number of both, as their gradients will be.

        `queries` is the model's number, `groups` the denoising groups of each micro-batch. mmdet takes at least 1 of
        that mean; then a process without objects would change what the others learn. The counts are known on the host,
        and stay there.
        """
        matched = sum(min(count, queries) for targets in batches for count in targets.counts)
        shown = sum(sum(targets.counts) * number for targets, number in zip(batches, groups, strict=True))
        all_matched, all_shown = distributed.all_reduce_sum(
            torch.tensor([matched, shown], dtype=torch.float64)
        ).tolist()
        share = len(batches) * distributed.world_size()
        return Normalizers(max(all_matched, 1) / share, max(all_shown, 1) / share, min(all_shown, 1))

    def forward(
        self, output: DetectorOutput, targets: Targets, normalizers: Normalizers | None = None
    ) -> dict[str, Tensor]:
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
        logits, boxes = stack((*output.layers, output.proposals))
        dn_logits, dn_boxes = stack(denoising.layers)
        wanted, matching = self.matching_targets(logits, boxes, targets)
        dn_wanted, restoring = self.denoising_targets(dn_logits, dn_boxes, denoising.groups, targets)
        focal = focal_losses([(logits, wanted), (dn_logits, dn_wanted)])
        l1, giou = box_losses([matching, restoring])
        focal[1] = (
            focal[1] * normalizers.any_shown
        )  # no loss without any object, but the padding queries stay in the graph
        prefixes = [*(f"d{i}." for i in range(len(output.layers) - 1)), ""]
        losses: dict[str, Tensor] = {}
        for names, *sums_by_kind, count in (
            ([*prefixes, "enc_"], focal[0], l1[0], giou[0], normalizers.matched),
            ([f"{prefix}dn_" for prefix in prefixes], focal[1], l1[1], giou[1], normalizers.shown),
        ):
            for (kind, weight), values in zip(self.weights.items(), sums_by_kind, strict=True):
                terms = (values * (weight / count)).unbind()
                losses |= {f"{name}{kind}": term for name, term in zip(names, terms, strict=True)}
        return losses

    def matching_targets(
        self, logits: Tensor, boxes: Tensor, targets: Targets
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """For answers (R, B, Q, T) and (R, B, Q, 4): the logits' targets, and what `box_losses` takes."""
        matched = match(logits, boxes, targets)  # (R, B, N)
        answers, batch, queries, tokens = logits.shape
        named = targets.positive_map.to(logits.dtype).expand(answers, -1, -1, -1)
        wanted = logits.new_zeros(answers, batch, queries + 1, tokens)  # the last row takes what matched nobody
        wanted = wanted.scatter(2, matched[..., None].expand(-1, -1, -1, tokens), named)[:, :, :queries]
        index = matched.clamp(max=queries - 1)[..., None].expand(-1, -1, -1, 4)
        weight = (matched < queries).to(boxes.dtype)
        return wanted, (boxes.gather(2, index), targets.boxes.expand(answers, -1, -1, -1), weight)

    def denoising_targets(
        self, logits: Tensor, boxes: Tensor, groups: int, targets: Targets
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The same for the denoising queries: those with little noise are to restore their object, the others to name
        nothing. Queries that stand for padding count as naming nothing, as in mmdet."""
        named = targets.positive_map[:, None].to(logits.dtype)  # (B, 1, N, T)
        wanted = torch.stack((named, torch.zeros_like(named)), dim=2)  # (B, 1, 2, N, T)
        wanted = wanted.expand(-1, groups, -1, -1, -1).flatten(1, 3).expand_as(logits)
        restored = boxes.unflatten(2, (groups, 2, -1))[:, :, :, 0]  # (R, B, G, N, 4)
        weight = targets.valid[:, None].to(boxes.dtype).expand(restored.shape[:-1])
        return wanted, (restored, targets.boxes[:, None].expand_as(restored), weight)
