"""Attention and feed-forward blocks that the enhancer, the decoder and the text layers are made of.

Axes: B images, Q queries, K keys, S image tokens, D width, M heads, L levels, P points.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundingdino.model.image_tokens import ImageTokens, Sampling
from groundingdino.ops import Activation, Linear, feed_forward, linear, ms_deform_attn


def attention_bias(attends: Tensor, dtype: torch.dtype) -> Tensor:
    """bool, True = may look -> what is added to the scores: 0 or -inf. Made once for all layers that share it."""
    return torch.zeros_like(attends, dtype=dtype).masked_fill(~attends, float("-inf"))


class _Attention(nn.Module):
    """`nn.MultiheadAttention`'s parameters: one packed input projection, queries, keys, values in this order."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def _split_projection(self, first: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Weight and bias of the `first` of the three projections, and of the others."""
        width = self.in_proj_weight.shape[1]
        parts = (first * width, (3 - first) * width)
        weights, biases = self.in_proj_weight.split(parts), self.in_proj_bias.split(parts)
        return (weights[0], biases[0]), (weights[1], biases[1])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """(B, Q, D) of queries (B, Q, D), keys and values (B, K, D)."""
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, M, ., D / M)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class SelfAttention(_Attention):
    """Tokens look at each other; their positions take part in the comparison, but not in what is read."""

    def forward(self, x: Tensor, position: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Returns (B, N, D).

        x (B, N, D), position the same or None; bias from `attention_bias`, broadcastable to (B, M, N, N).
        """
        if position is None:
            q, k, v = linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            query_key, value = self._split_projection(2)
            q, k = linear(x + position, *query_key).chunk(2, dim=-1)
            v = linear(x, *value)
        return self._attend(q, k, v, bias)


class CrossAttention(_Attention):
    """Queries look at a memory."""

    def forward(self, query: Tensor, memory: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns (B, Q, D).

        query (B, Q, D), memory (B, K, D); bias from `attention_bias`, broadcastable to (B, M, Q, K).
        """
        query_part, key_value = self._split_projection(1)
        q = linear(query, *query_part)
        k, v = linear(memory, *key_value).chunk(2, dim=-1)
        return self._attend(q, k, v, bias)


class FeedForward(nn.Module):
    """Linear, activation, Linear; the caller adds the residual."""

    def __init__(self, width: int, hidden_width: int, activation: Activation = "relu") -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = Linear(width, hidden_width)
        self.fc2 = Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return feed_forward(x, self.fc1, self.fc2, self.activation)


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

    def forward(self, query: Tensor, memory: Tensor, sampling: Sampling, image: ImageTokens) -> Tensor:
        """Look around the centres: returns (B, Q, D).

        Args:
            query: (B, Q, D), position included.
            memory: (B, S, D), the image tokens to look at.
            sampling: centres and scale of the offsets for (B, Q, L, P, 2).
            image: shapes and padding of these tokens.
        """
        # Values, zero in the padding
        value = self.value_proj(memory)
        if image.valid is not None:
            value = value.masked_fill(~image.valid[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))  # (B, S, M, D / M)

        # Sampling locations stay float32 under autocast: bfloat16 would round them to a third of a pixel.
        split = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).float().unflatten(-1, (*split, 2))  # (B, Q, M, L, P, 2)
        locations = torch.addcmul(sampling.centers[:, :, None], offsets, sampling.scale[:, :, None])

        # Weights of the samples
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1, dtype=torch.float32)

        out = ms_deform_attn(value, image.shapes, locations, weights.unflatten(-1, split[1:]))
        return self.output_proj(out.to(value.dtype))
