"""Contrastive denoising queries (DINO section 3.3; mmdet `layers/transformer/dino_layers.py::CdnQueryGenerator`).

Each object is shown to the decoder G times with a little noise on its box (to be restored) and G times with more noise
(to be rejected). Drawing the noise is separate from using it, so that a test can give the draws.

Axes: B images, G groups, 2 (little, more), N objects, D width. The queries lie in the order (G, 2, N).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from groundingdino import boxes as box_ops
from groundingdino.model.heads import inverse_sigmoid
from groundingdino.structures import Prediction, Targets

LABEL_NOISE = 0.25  # share of the labels that are replaced
BOX_NOISE = 1.0  # corners move by up to this times half the box's size


@dataclass(frozen=True)
class DenoisingNoise:
    """The random numbers of the denoising queries."""

    label_draw: Tensor  # (B, G, 2, N) uniform in [0, 1); a label is replaced where it is below LABEL_NOISE
    label_random: Tensor  # (B, G, 2, N) int64, what it is replaced by
    box_sign: Tensor  # (B, G, 2, N, 4) -1 or 1, per corner coordinate
    box_draw: Tensor  # (B, G, 2, N, 4) uniform in [0, 1)


@dataclass(frozen=True)
class DenoisingQueries:
    """Extra queries that go in front of the matching ones."""

    content: Tensor  # (B, G * 2 * N, D)
    boxes: Tensor  # (B, G * 2 * N, 4) reference boxes, cxcywh in [0, 1]
    group_size: int  # 2 * N


@dataclass(frozen=True)
class DenoisingOutput:
    """The decoder's outputs for the denoising queries."""

    layers: tuple[Prediction, ...]  # each (B, G * 2 * N, ...)
    groups: int


def num_groups(counts: tuple[int, ...], num_denoising: int) -> int:
    """How often every object is repeated, from the numbers of objects of the images."""
    return max(1, num_denoising // max(counts)) if any(counts) else 1


def draw_noise(targets: Targets, num_denoising: int, num_labels: int) -> DenoisingNoise:
    """Noise for these targets, from the random state of their device."""
    device, (batch, objects) = targets.boxes.device, targets.labels.shape
    shape = (batch, num_groups(targets.counts, num_denoising), 2, objects)
    return DenoisingNoise(
        label_draw=torch.rand(shape, device=device),
        label_random=torch.randint(num_labels, shape, device=device),
        box_sign=torch.randint(2, (*shape, 4), device=device).float() * 2 - 1,
        box_draw=torch.rand((*shape, 4), device=device),
    )


class Denoising(nn.Module):
    """Targets and noise -> denoising queries."""

    def __init__(self, width: int, num_labels: int) -> None:
        super().__init__()
        self.label_embedding = nn.Embedding(num_labels, width)

    def forward(self, targets: Targets, noise: DenoisingNoise) -> DenoisingQueries:
        """Padded objects become queries of zeros at the centre of the image, as in mmdet."""
        replaced = noise.label_draw < LABEL_NOISE
        labels = torch.where(replaced, noise.label_random, targets.labels[:, None, None, :])
        real = targets.valid[:, None, None, :, None]  # (B, 1, 1, N, 1)
        content = self.label_embedding(labels) * real

        corners = box_ops.cxcywh_to_xyxy(targets.boxes)[:, None, None]
        half_size = targets.boxes[:, None, None, :, 2:].repeat(1, 1, 1, 1, 2) / 2  # (B, 1, 1, N, 4)
        more = torch.arange(2, device=corners.device)[:, None, None]  # 0 for little noise, 1 for more
        shift = (noise.box_draw + more) * noise.box_sign * half_size * BOX_NOISE
        noisy = box_ops.xyxy_to_cxcywh((corners + shift).clamp(0, 1))
        noisy = torch.where(real, inverse_sigmoid(noisy, eps=1e-3), 0.0).sigmoid()
        return DenoisingQueries(content.flatten(1, 3), noisy.flatten(1, 3), 2 * labels.shape[-1])


def split_queries(
    layers: Sequence[Prediction], queries: DenoisingQueries
) -> tuple[DenoisingOutput, tuple[Prediction, ...]]:
    """The predictions for the denoising queries, and those for the matching queries behind them."""
    count = queries.boxes.shape[1]
    denoising = tuple(Prediction(layer.logits[:, :count], layer.boxes[:, :count]) for layer in layers)
    matching = tuple(Prediction(layer.logits[:, count:], layer.boxes[:, count:]) for layer in layers)
    return DenoisingOutput(denoising, count // queries.group_size), matching


def self_attention_mask(num_denoising: int, group_size: int, num_matching: int, device: torch.device) -> Tensor:
    """(Q, Q) bool, True = may look, Q = num_denoising + num_matching.

    A denoising query sees its own group and the matching queries, a matching query the matching queries only.
    """
    matching = num_denoising // group_size
    group = torch.arange(num_denoising + num_matching, device=device) // group_size
    group = group.clamp(max=matching)
    return (group[:, None] == group[None, :]) | (group[None, :] == matching)
