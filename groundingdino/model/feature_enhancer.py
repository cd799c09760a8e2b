"""The feature enhancer: fusion, text self-attention, deformable image self-attention, six times over.

(Grounding DINO section 3.2; mmdet `layers/transformer/grounding_dino_layers.py`.)
Axes: B images, S image tokens, T text tokens, D width, L levels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from groundingdino.config import ModelConfig
from groundingdino.model.attention import DeformableAttention, FeedForward, SelfAttention, attention_bias
from groundingdino.model.fusion import Fusion
from groundingdino.model.positions import text_position_encoding
from groundingdino.structures import TextBatch


@dataclass(frozen=True)
class ImageTokens:
    """What the image half of the model hands on; `take` repeats it for several sentences."""

    tokens: Tensor  # (B, S, D)
    position: Tensor  # (B, S, D) sine encoding + level embedding
    valid: Tensor | None  # (B, S) bool, True = real; None where nothing is padded
    valid_ratios: Tensor  # (B, L, 2) share of each padded map that is image, (x, y)
    grid: Tensor  # (B, S, 2) centre of each token in the unpadded image, (x, y) in [0, 1]; beyond 1 in the padding
    level_sizes: Tensor  # (L, 2) width and height of each map, float
    shapes: tuple[tuple[int, int], ...]  # (height, width) of each map, on the host

    def take(self, index: list[int]) -> "ImageTokens":
        """Rows of the batch, in this order, repeats allowed: one image for several sentences."""

        def rows(x: Tensor) -> Tensor:
            return x.expand(len(index), *x.shape[1:]) if len(x) == 1 else x[index]

        return ImageTokens(
            rows(self.tokens), rows(self.position), None if self.valid is None else rows(self.valid),
            rows(self.valid_ratios), rows(self.grid), self.level_sizes, self.shapes,
        )  # fmt: skip


class TextLayer(nn.Module):
    """Self-attention inside each sub-sentence, post-norm."""

    def __init__(self, width: int, num_heads: int, ffn_width: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads)
        self.attention_norm = nn.LayerNorm(width)
        self.ffn = FeedForward(width, ffn_width)
        self.ffn_norm = nn.LayerNorm(width)

    def forward(self, text: Tensor, position: Tensor, bias: Tensor) -> Tensor:
        """text and position (B, T, D), bias (B, 1, T, T) from `attention_bias`."""
        text = self.attention_norm(text + self.attention(text, position, bias))
        return self.ffn_norm(text + self.ffn(text))


class ImageLayer(nn.Module):
    """Deformable self-attention over all levels, post-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = DeformableAttention(config.width, config.num_heads, config.num_levels, config.num_points)
        self.attention_norm = nn.LayerNorm(config.width)
        self.ffn = FeedForward(config.width, config.ffn_width)
        self.ffn_norm = nn.LayerNorm(config.width)

    def forward(self, memory: Tensor, image: ImageTokens, centers: Tensor, offset_scale: Tensor) -> Tensor:
        """memory (B, S, D), centers (B, S, L, P, 2), offset_scale (1, 1, L, P, 2).

        Returns what `ffn_norm` has to be applied to. With the norm outside, a layer that is recomputed in the backward
        pass ends before the feed-forward's second product, which no gradient inside needs.
        """
        query = memory + image.position
        looked = self.attention(query, memory, centers, offset_scale, image.shapes, image.valid)
        memory = self.attention_norm(memory + looked)
        return memory + self.ffn(memory)


class EnhancerLayer(nn.Module):
    """One round: fuse, then each modality by itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fusion = Fusion(config.width, config.fusion_width, config.fusion_heads, config.fusion_dropout)
        self.text_layer = TextLayer(config.width, config.text_layer_heads, config.text_layer_ffn_width)
        self.image_layer = ImageLayer(config)

    def forward(
        self, memory: Tensor, text_memory: Tensor, image: ImageTokens, text: TextBatch,
        text_position: Tensor, text_bias: Tensor, centers: Tensor, offset_scale: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """memory (B, S, D), text_memory (B, T, D); returns both, memory without the image layer's last norm."""
        memory, text_memory = self.fusion(memory, text_memory, image.valid, text.valid)
        text_memory = self.text_layer(text_memory, text_position, text_bias)
        memory = self.image_layer(memory, image, centers, offset_scale)
        return memory, text_memory


class FeatureEnhancer(nn.Module):
    """Image tokens and text tokens -> memory and text memory that know of each other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.recompute = False
        self.num_points = config.num_points
        self.layers = nn.ModuleList(EnhancerLayer(config) for _ in range(config.enhancer_layers))

    def forward(self, image: ImageTokens, text_tokens: Tensor, text: TextBatch) -> tuple[Tensor, Tensor]:
        """Returns memory (B, S, D) and text_memory (B, T, D)."""
        memory, text_memory = image.tokens, text_tokens
        # Repeated for the points here: to broadcast over the last axis of two costs every layer four times as much.
        centers = (image.grid[:, :, None] * image.valid_ratios[:, None])[:, :, :, None]  # in each padded map
        centers = centers.expand(-1, -1, -1, self.num_points, -1).contiguous()  # (B, S, L, P, 2)
        offset_scale = (1 / image.level_sizes)[None, None, :, None].expand(-1, -1, -1, self.num_points, -1).contiguous()
        text_position = text_position_encoding(text.position_ids, text_tokens.shape[-1]).to(text_tokens.dtype)
        text_bias = attention_bias(text.attends[:, None], text_tokens.dtype)
        for layer in self.layers:
            inputs = (memory, text_memory, image, text, text_position, text_bias, centers, offset_scale)
            if self.recompute and self.training and torch.is_grad_enabled():
                memory, text_memory = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                memory, text_memory = layer(*inputs)
            memory = layer.image_layer.ffn_norm(memory)
        return memory, text_memory
