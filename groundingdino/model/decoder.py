"""The cross-modality decoder (Grounding DINO section 3.4; mmdet `GroundingDinoTransformerDecoder`).

Axes: B images, Q queries, S image tokens, T text tokens, L levels, D width.
"""

import torch
from torch import Tensor, nn

from groundingdino.config import ModelConfig
from groundingdino.model.attention import (
    CrossAttention,
    DeformableAttention,
    FeedForward,
    SelfAttention,
    attention_bias,
)
from groundingdino.model.feature_enhancer import ImageTokens
from groundingdino.model.heads import BoxHead, ContrastiveHead, contrast, inverse_sigmoid
from groundingdino.model.positions import box_encoding
from groundingdino.ops import Linear
from groundingdino.structures import Prediction


class DecoderLayer(nn.Module):
    """Self-attention, text attention, deformable image attention, feed-forward; post-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, heads = config.width, config.num_heads
        self.self_attention = SelfAttention(width, heads)
        self.self_attention_norm = nn.LayerNorm(width)
        self.text_attention = CrossAttention(width, heads)
        self.text_attention_norm = nn.LayerNorm(width)
        self.image_attention = DeformableAttention(width, heads, config.num_levels, config.num_points)
        self.image_attention_norm = nn.LayerNorm(width)
        self.ffn = FeedForward(width, config.ffn_width)
        self.ffn_norm = nn.LayerNorm(width)
        self.num_points = config.num_points

    def forward(
        self, query: Tensor, position: Tensor, reference: Tensor, self_bias: Tensor | None,
        memory: Tensor, image: ImageTokens, text_memory: Tensor, text_bias: Tensor,
    ) -> Tensor:  # fmt: skip
        """query and position (B, Q, D), reference (B, Q, L, 4) in each padded map; biases from
        `attention_bias`: (Q, Q) or None, and (B, 1, 1, T)."""
        query = self.self_attention_norm(query + self.self_attention(query, position, self_bias))
        text_out = self.text_attention(query + position, text_memory, text_bias)
        query = self.text_attention_norm(query + text_out)
        centers, offset_scale = reference[:, :, :, None].split(2, dim=-1)
        looked = self.image_attention(
            query + position, memory, centers, offset_scale * (0.5 / self.num_points), image.shapes, image.valid
        )
        query = self.image_attention_norm(query + looked)
        return self.ffn_norm(query + self.ffn(query))


class Decoder(nn.Module):
    """Refines reference boxes layer by layer; every layer answers with logits and boxes of its own heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.position_fc1 = Linear(2 * width, width)
        self.position_fc2 = Linear(width, width)
        self.contrastive_heads = nn.ModuleList(ContrastiveHead() for _ in range(config.decoder_layers))
        self.box_heads = nn.ModuleList(BoxHead(width) for _ in range(config.decoder_layers))

    def forward(
        self, query: Tensor, boxes: Tensor, attends: Tensor | None,
        memory: Tensor, image: ImageTokens, text_memory: Tensor, text_valid: Tensor,
    ) -> tuple[Prediction, ...]:  # fmt: skip
        """query (B, Q, D), boxes (B, Q, 4) first references, attends (Q, Q) bool or None. One prediction a layer."""
        ratios = torch.cat((image.valid_ratios, image.valid_ratios), dim=-1)[:, None]  # (B, 1, L, 4)
        self_bias = None if attends is None else attention_bias(attends, query.dtype)
        text_bias = attention_bias(text_valid[:, None, None], query.dtype)  # (B, 1, 1, T)
        reference = boxes  # what the next layer looks around, without gradient
        forward_reference = boxes  # the same with the last layer's gradient ("look forward twice", DINO section 3.5)
        features, answers = [], []
        for layer, box_head in zip(self.layers, self.box_heads, strict=True):
            scaled = reference[:, :, None] * ratios
            position = box_encoding(scaled[:, :, 0], query.shape[-1] // 2).to(query.dtype)
            position = self.position_fc2(self.position_fc1(position, activation="relu"))
            query = layer(query, position, scaled, self_bias, memory, image, text_memory, text_bias)
            features.append(self.norm(query))
            # Two boxes a layer: the normed query's is the answer, the plain query's where the next layer looks.
            answer, step = box_head(torch.stack((features[-1], query)))
            answers.append((answer + inverse_sigmoid(forward_reference, eps=1e-5)).sigmoid())
            forward_reference = (step + inverse_sigmoid(reference, eps=1e-3)).sigmoid()
            reference = forward_reference.detach()
        bias = torch.stack([head.bias for head in self.contrastive_heads])[:, None, None]  # (layers, 1, 1, 1)
        logits = contrast(torch.stack(features), text_memory, text_valid, bias)
        return tuple(Prediction(layer_logits, box) for layer_logits, box in zip(logits, answers, strict=True))
