"""Multi-scale deformable attention written with `grid_sample`: the judge of every kernel and the path of every device
that has none.

Axes: B images, S image tokens, M heads, C channels a head, Q queries, L levels, P points.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_BILINEAR, _ZEROS = 0, 0  # the enums of aten::grid_sampler_2d


def ms_deform_attn_reference(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """What `groundingdino.ops.ms_deform_attn` computes, same arguments, differentiable to any order torch allows.

    Formula 2 of Deformable DETR (Zhu et al. 2021); mmcv `multi_scale_deformable_attn_pytorch`.
    """
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    out = value.new_zeros(batch * heads, channels, queries)
    for feature, grid, weight in _levels(value, shapes, locations, weights):
        sampled = F.grid_sample(feature, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        out = out + (sampled * weight).sum(-1)  # sampled (B*M, C, Q, P)
    return out.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


def ms_deform_attn_backward_reference(
    grad_output: Tensor, value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights for `grad_output` (B, Q, M*C), without a recorded graph.

    It samples again instead of keeping (B*M, C, Q, L*P) values from the forward pass.
    """
    batch, tokens, heads, channels = value.shape
    queries = locations.shape[1]
    grad = grad_output.reshape(batch, queries, heads, channels).permute(0, 2, 3, 1)
    grad = grad.reshape(batch * heads, channels, queries, 1)
    by_level = []
    for feature, grid, weight in _levels(value, shapes, locations, weights):
        sampled = F.grid_sample(feature, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        grad_weight = (sampled * grad).sum(1)  # (B*M, Q, P)
        grad_feature, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            (grad * weight).contiguous(), feature, grid, _BILINEAR, _ZEROS, False, [True, True]
        )
        by_level.append((grad_feature.flatten(2), 2 * grad_grid, grad_weight))
    grad_features, grad_locations, grad_weights = zip(*by_level, strict=True)
    grad_value = torch.cat(grad_features, dim=2).view(batch, heads, channels, tokens).permute(0, 3, 1, 2)
    points = locations.shape[4]
    by_query = (batch, heads, queries, len(shapes), points)
    return (
        grad_value.contiguous(),
        torch.stack(grad_locations, dim=2).view(*by_query, 2).transpose(1, 2).contiguous(),
        torch.stack(grad_weights, dim=2).view(by_query).transpose(1, 2).contiguous(),
    )


def _levels(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each level: features (B*M, C, H, W), grid (B*M, Q, P, 2) in [-1, 1], weights (B*M, 1, Q, P)."""
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    features = value.permute(0, 2, 3, 1).split([height * width for height, width in shapes], dim=-1)
    grids = (2 * locations - 1).transpose(1, 2)  # (B, M, Q, L, P, 2)
    weights = weights.transpose(1, 2)
    return [
        (
            feature.reshape(batch * heads, channels, height, width),
            grids[:, :, :, level].reshape(batch * heads, queries, points, 2),
            weights[:, :, :, level].reshape(batch * heads, 1, queries, points),
        )
        for level, (feature, (height, width)) in enumerate(zip(features, shapes, strict=True))
    ]
