"""Attention and feed-forward blocks that the enhancer, the decoder and the text layers are made of.

Axes: B images, Q queries, K keys, S image tokens, D width, M heads, L levels, P points.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundingdino.ops import Activation, Linear, feed_forward, linear, ms_deform_attn


def attention_bias(attends: Tensor, dtype: torch.dtype) -> Tensor:
    """bool, True = may look -> what is added to the scores: 0 or -inf. Made once for all layers that share it."""
    return torch.zeros_like(attends, dtype=dtype).masked_fill(~attends, float("-inf"))


class MultiheadAttention(nn.Module):
    """`nn.MultiheadAttention`'s parameters, with a mask per sample and scaled_dot_product_attention inside."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """query (B, Q, D), key and value (B, K, D); key is the same tensor as query or as value.

        bias from `attention_bias`, broadcastable to (B, M, Q, K). Returns (B, Q, D).
        """
        width = query.shape[-1]
        # Two of the three inputs are always the same tensor: project them in one product.
        if query is key:
            parts = (2 * width, width)
            (qk_weight, v_weight), (qk_bias, v_bias) = self.in_proj_weight.split(parts), self.in_proj_bias.split(parts)
            q, k = linear(query, qk_weight, qk_bias).chunk(2, dim=-1)
            v = linear(value, v_weight, v_bias)
        else:
            assert key is value
            parts = (width, 2 * width)
            (q_weight, kv_weight), (q_bias, kv_bias) = self.in_proj_weight.split(parts), self.in_proj_bias.split(parts)
            q = linear(query, q_weight, q_bias)
            k, v = linear(key, kv_weight, kv_bias).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, M, ., D / M)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear, activation, Linear; the caller adds the residual."""

    def __init__(self, width: int, hidden_width: int, activation: Activation = "relu") -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = Linear(width, hidden_width)
        self.fc2 = Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return feed_forward(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, self.activation)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al. 2021, eq. 3; mmcv `ops/multi_scale_deform_attn.py`)."""

    def __init__(self, width: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = Linear(width, num_heads * num_levels * num_points * 2)
        self.attention_weights = Linear(width, num_heads * num_levels * num_points)
        self.value_proj = Linear(width, width)
        self.output_proj = Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """mmcv's start: head m looks in direction m, point p at p + 1 pixels, all with equal weight."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angles.cos(), angles.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)
        offsets = direction[:, None, None, :] * steps[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        centers: Tensor,
        offset_scale: Tensor,
        shapes: Sequence[tuple[int, int]],
        valid: Tensor | None,
    ) -> Tensor:
        """Look around the centres.

        Args:
            query: (B, Q, D), position included.
            value: (B, S, D) image tokens.
            centers: broadcastable to (B, Q, L, P, 2): reference point in each level's padded map, (x, y) in [0, 1].
            offset_scale: likewise: what an offset of 1 is worth in those units.
            shapes: (height, width) of each level, on the host.
            valid: (B, S) bool, True = real, or None where nothing is padded.

        Returns:
            (B, Q, D).
        """
        split = (self.num_heads, self.num_levels, self.num_points)
        value = self.value_proj(value)
        if valid is not None:
            value = value.masked_fill(~valid[..., None], 0.0)
        # Locations stay float32 under autocast: bfloat16 would round them to a third of a pixel.
        offsets = self.sampling_offsets(query).float().unflatten(-1, (*split, 2))  # (B, Q, M, L, P, 2)
        locations = torch.addcmul(centers[:, :, None], offsets, offset_scale[:, :, None])
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1, dtype=torch.float32)
        value = value.unflatten(-1, (self.num_heads, -1))  # (B, S, M, D / M)
        out = ms_deform_attn(value, shapes, locations, weights.unflatten(-1, split[1:]))
        return self.output_proj(out.to(value.dtype))
