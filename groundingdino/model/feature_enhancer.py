"""The feature enhancer: fusion, text self-attention, deformable image self-attention, six times over.

(Grounding DINO section 3.2; mmdet `layers/transformer/grounding_dino_layers.py`.)
Axes: B images, S image tokens, T text tokens, D width, L levels.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from groundingdino.config import ModelConfig
from groundingdino.model.attention import DeformableAttention, FeedForward, SelfAttention
from groundingdino.model.fusion import Fusion
from groundingdino.model.image_tokens import ImageTokens, Sampling
from groundingdino.model.text_encoder import TextContext


def _run(part: Callable[..., Any], recompute: bool, image: ImageTokens, other: Any) -> Any:
    """`part(image, other)`; with `recompute` its intermediate values are computed again in the backward pass."""
    if not recompute:
        return part(image, other)
    # torch restores the random state, for the same dropout, of the devices of the tensors among its arguments.
    return checkpoint(lambda tokens: part(replace(image, tokens=tokens), other), image.tokens, use_reentrant=False)


class TextLayer(nn.Module):
    """Self-attention inside each sub-sentence, post-norm."""

    def __init__(self, width: int, num_heads: int, ffn_width: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads)
        self.attention_norm = nn.LayerNorm(width)
        self.ffn = FeedForward(width, ffn_width)
        self.ffn_norm = nn.LayerNorm(width)

    def forward(self, text: TextContext) -> Tensor:
        """The new text tokens (B, T, D)."""
        # Attention inside each sub-sentence
        tokens = self.attention_norm(text.tokens + self.attention(text.tokens, text.position, text.bias))

        # Feed-forward
        return self.ffn_norm(tokens + self.ffn(tokens))


class ImageLayer(nn.Module):
    """Deformable self-attention over all levels, post-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = DeformableAttention(config.width, config.num_heads, config.num_levels, config.num_points)
        self.attention_norm = nn.LayerNorm(config.width)
        self.ffn = FeedForward(config.width, config.ffn_width)
        self.ffn_norm = nn.LayerNorm(config.width)

    def forward(self, image: ImageTokens, sampling: Sampling, recompute: bool = False) -> Tensor:
        """The new image tokens (B, S, D).

        The norm is never recomputed: what is before it then ends at a sum, and the backward pass needs no second
        feed-forward to get there.
        """
        return self.ffn_norm(_run(self.attend_and_feed, recompute, image, sampling))

    def attend_and_feed(self, image: ImageTokens, sampling: Sampling) -> Tensor:
        """The image tokens (B, S, D) before the last norm."""
        # Attention to all levels
        query_with_position = image.tokens + image.position
        image_out = self.attention(query_with_position, image.tokens, sampling, image)
        tokens = self.attention_norm(image.tokens + image_out)

        # Feed-forward
        return tokens + self.ffn(tokens)


class EnhancerLayer(nn.Module):
    """One round: fuse, then each modality by itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fusion = Fusion(config.width, config.fusion_width, config.fusion_heads, config.fusion_dropout)
        self.text_layer = TextLayer(config.width, config.text_layer_heads, config.text_layer_ffn_width)
        self.image_layer = ImageLayer(config)

    def forward(
        self, image: ImageTokens, text: TextContext, sampling: Sampling, recompute: bool = False
    ) -> tuple[ImageTokens, TextContext]:
        """Both with new tokens."""
        # Image and text attend to each other, and the text to itself
        image, text = _run(self.fuse, recompute, image, text)

        # The image attends to itself
        return replace(image, tokens=self.image_layer(image, sampling, recompute)), text

    def fuse(self, image: ImageTokens, text: TextContext) -> tuple[ImageTokens, TextContext]:
        """Both with new tokens, the image's before its own layer."""
        image_tokens, text_tokens = self.fusion(image.tokens, text.tokens, image.valid, text.valid)
        image, text = replace(image, tokens=image_tokens), replace(text, tokens=text_tokens)
        return image, replace(text, tokens=self.text_layer(text))


class FeatureEnhancer(nn.Module):
    """Makes image tokens and text tokens know of each other."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.recompute = False
        self.num_points = config.num_points
        self.layers = nn.ModuleList(EnhancerLayer(config) for _ in range(config.enhancer_layers))

    def forward(self, image: ImageTokens, text: TextContext) -> tuple[ImageTokens, TextContext]:
        """Both with the tokens that mmdet calls memory and memory_text: (B, S, D) and (B, T, D)."""
        sampling = self.token_sampling(image)
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            image, text = layer(image, text, sampling, recompute)
        return image, text

    def token_sampling(self, image: ImageTokens) -> Sampling:
        """Every token looks around its own centre, and an offset of 1 is a pixel of the level looked at."""
        centers = image.grid[:, :, None] * image.valid_ratios[:, None]  # (B, S, L, 2) in each padded map
        scale = (1 / image.level_sizes)[None, None]  # (1, 1, L, 2)

        # Repeated for the points here: to broadcast over the last axis of two costs every layer four times as much.
        def repeated(x: Tensor) -> Tensor:
            return x[:, :, :, None].expand(-1, -1, -1, self.num_points, -1).contiguous()

        return Sampling(repeated(centers), repeated(scale))
