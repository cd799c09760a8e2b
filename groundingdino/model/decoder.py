"""The cross-modality decoder (Grounding DINO section 3.4; mmdet `GroundingDinoTransformerDecoder`).

Axes: B images, Q queries, S image tokens, T text tokens, L levels, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundingdino.config import ModelConfig
from groundingdino.model.attention import (
    CrossAttention,
    DeformableAttention,
    FeedForward,
    SelfAttention,
    attention_bias,
)
from groundingdino.model.heads import BoxHead, ContrastiveHead, inverse_sigmoid
from groundingdino.model.image_tokens import ImageTokens, Sampling
from groundingdino.model.positions import box_encoding
from groundingdino.model.text_encoder import TextContext
from groundingdino.ops import Linear
from groundingdino.structures import Prediction


@dataclass(frozen=True)
class QueryContext:
    """Where the queries of one layer are, and what they may look at."""

    position: Tensor  # (B, Q, D)
    sampling: Sampling  # of (B, Q, L, P, 2)
    bias: Tensor | None  # (Q, Q) from `attention_bias`; None where every query may look at every other
    text_bias: Tensor  # (B, 1, 1, T) likewise


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

    def forward(self, query: Tensor, context: QueryContext, image: ImageTokens, text: TextContext) -> Tensor:
        """The new queries (B, Q, D); query (B, Q, D)."""
        # Attention to each other
        query = self.self_attention_norm(query + self.self_attention(query, context.position, context.bias))

        # Attention to the text
        text_out = self.text_attention(query + context.position, text.tokens, context.text_bias)
        query = self.text_attention_norm(query + text_out)

        # Attention to the image
        query_with_position = query + context.position
        image_out = self.image_attention(query_with_position, image.tokens, context.sampling, image)
        query = self.image_attention_norm(query + image_out)

        # Feed-forward
        return self.ffn_norm(query + self.ffn(query))


class Decoder(nn.Module):
    """Refines reference boxes layer by layer; every layer predicts logits and boxes with its own heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.num_points = config.num_points
        self.box_eps = config.box_eps
        self.box_features = width // 2  # of each of the four numbers of a box
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.position_fc1 = Linear(2 * width, width)
        self.position_fc2 = Linear(width, width)
        scale = config.learned_scale
        self.contrastive_heads = nn.ModuleList(ContrastiveHead(scale) for _ in range(config.decoder_layers))
        self.box_heads = nn.ModuleList(BoxHead(width) for _ in range(config.decoder_layers))

    def forward(
        self, query: Tensor, boxes: Tensor, attends: Tensor | None, image: ImageTokens, text: TextContext
    ) -> tuple[Prediction, ...]:
        """One prediction per layer.

        query (B, Q, D), boxes (B, Q, 4) the first references, attends (Q, Q) bool or None, where all may look at all.
        """
        ratios = torch.cat((image.valid_ratios, image.valid_ratios), dim=-1)[:, None]  # (B, 1, L, 4)
        bias = None if attends is None else attention_bias(attends, query.dtype)
        text_bias = attention_bias(text.valid[:, None, None], query.dtype)  # (B, 1, 1, T)
        reference = boxes  # what the next layer looks around, without gradient
        forward_reference = boxes  # the same with the last layer's gradient ("look forward twice", DINO section 3.5)
        predictions = []
        for layer, box_head, contrastive_head in zip(self.layers, self.box_heads, self.contrastive_heads, strict=True):
            # Attention around the reference boxes
            position, sampling = self.locate(reference, ratios, query.dtype)
            query = layer(query, QueryContext(position, sampling, bias, text_bias), image, text)

            # Two boxes: the normed query's is the layer's, the plain query's is where the next layer looks.
            normed = self.norm(query)
            answer, step = box_head(torch.stack((normed, query)))
            box = (answer + inverse_sigmoid(forward_reference, self.box_eps)).sigmoid()
            predictions.append(Prediction(contrastive_head(normed, text), box))
            forward_reference = (step + inverse_sigmoid(reference, eps=1e-3)).sigmoid()
            reference = forward_reference.detach()
        return tuple(predictions)

    def locate(self, reference: Tensor, ratios: Tensor, dtype: torch.dtype) -> tuple[Tensor, Sampling]:
        """The queries' positions (B, Q, D) and sampling for reference boxes (B, Q, 4); ratios (B, 1, L, 4)."""
        boxes = reference[:, :, None] * ratios  # (B, Q, L, 4) in each padded map

        # On the finest level, as in mmdet
        encoding = box_encoding(boxes[:, :, 0], self.box_features).to(dtype)
        position = self.position_fc2(F.relu(self.position_fc1(encoding)))

        # Offsets are worth half a box, shared by the points.
        center, size = boxes[:, :, :, None].split(2, dim=-1)
        return position, Sampling(center, size * (0.5 / self.num_points))
