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

    def _project(self, x: Tensor, first: int, count: int) -> tuple[Tensor, ...]:
        """(B, N, D) -> `count` of queries (0), keys (1) and values (2), from `first` on, each (B, M, N, D / M)."""
        width = x.shape[-1]
        rows = slice(first * width, (first + count) * width)
        projected = linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])
        return projected.unflatten(-1, (count, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """(B, M, ., D / M) each -> (B, Q, D)."""
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class SelfAttention(_Attention):
    """Tokens look at each other; their positions take part in the comparison, but not in what is read."""

    def forward(self, x: Tensor, position: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Returns (B, N, D).

        x (B, N, D), position the same or None; bias from `attention_bias`, broadcastable to (B, M, N, N).
        """
        if position is None:
            q, k, v = self._project(x, 0, 3)
        else:
            q, k = self._project(x + position, 0, 2)
            (v,) = self._project(x, 2, 1)
        return self._attend(q, k, v, bias)


class CrossAttention(_Attention):
    """Queries look at a memory."""

    def forward(self, query: Tensor, memory: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns (B, Q, D).

        query (B, Q, D), memory (B, K, D); bias from `attention_bias`, broadcastable to (B, M, Q, K).
        """
        (q,) = self._project(query, 0, 1)
        k, v = self._project(memory, 1, 2)
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
