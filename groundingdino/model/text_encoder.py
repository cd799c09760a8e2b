"""BERT (Devlin et al. 2019) as Grounding DINO uses it: own positions, a mask per sub-sentence, no pooler.

Our own module, not transformers': its interface to three-dimensional masks has broken several times (USERS pains).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from groundingdino.config import TextConfig
from groundingdino.model.attention import FeedForward, SelfAttention, attention_bias
from groundingdino.model.positions import text_position_encoding
from groundingdino.ops import Linear
from groundingdino.structures import TextBatch

LAYER_NORM_EPS = 1e-12


@dataclass(frozen=True)
class TextContext:
    """Text tokens, and what every layer needs to attend to them."""

    tokens: Tensor  # (B, T, D)
    valid: Tensor  # (B, T) bool, True = real
    position: Tensor  # (B, T, D) sine encoding
    bias: Tensor  # (B, 1, T, T) `attention_bias` of each sub-sentence to itself


def text_context(tokens: Tensor, text: TextBatch) -> TextContext:
    """The context of text tokens (B, T, D), computed once per forward."""
    return TextContext(
        tokens=tokens,
        valid=text.valid,
        position=text_position_encoding(text.position_ids, tokens.shape[-1]).to(tokens.dtype),
        bias=attention_bias(text.attends[:, None], tokens.dtype),
    )


class BertEmbeddings(nn.Module):
    """Word + position + segment 0, normalised."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.max_positions, config.width)
        self.token_type = nn.Embedding(2, config.width)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        for embedding in (self.word, self.position, self.token_type):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, token_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(B, T, width) of ids (B, T) and positions (B, T)."""
        segment = self.token_type(torch.zeros_like(token_ids))
        return self.norm(self.word(token_ids) + self.position(position_ids) + segment)


class BertLayer(nn.Module):
    """One post-norm transformer layer."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.num_heads)
        self.attention_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.ffn = FeedForward(config.width, config.ffn_width, "gelu")
        self.ffn_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        for weight in (self.attention.in_proj_weight, self.attention.out_proj.weight):
            nn.init.normal_(weight, std=0.02)
        for projection in (self.ffn.fc1, self.ffn.fc2):
            nn.init.normal_(projection.weight, std=0.02)
            nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Returns (B, T, width). x (B, T, width), bias (B, 1, T, T) from `attention_bias`."""
        # Attention inside each sub-sentence
        x = self.attention_norm(x + self.attention(x, bias=bias))

        # Feed-forward
        return self.ffn_norm(x + self.ffn(x))


class TextEncoder(nn.Module):
    """Token ids -> text tokens in the detector's width."""

    def __init__(self, config: TextConfig, width: int) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_layers))
        self.projection = Linear(config.width, width)
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, text: TextBatch) -> Tensor:
        """(B, T, D). A token attends to its own sub-sentence only, so captions of one batch are independent."""
        x = self.embeddings(text.token_ids, text.position_ids)
        bias = attention_bias(text.attends[:, None], x.dtype)
        for layer in self.layers:
            x = layer(x, bias)
        return self.projection(x)
