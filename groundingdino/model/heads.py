"""What turns query features into logits and boxes (mmdet `dense_heads/grounding_dino_head.py`)."""

import torch
from torch import Tensor, nn

from groundingdino.ops import Linear

START_BIAS = -4.6  # log of the prior probability 0.01


def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
    """log(x / (1 - x)) with both sides kept above eps (mmdet `layers/transformer/utils.py`)."""
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class BoxHead(nn.Module):
    """Three-layer MLP that answers with an offset in box logits; starts at zero, so at the reference."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, width)
        self.fc2 = Linear(width, width)
        self.fc3 = Linear(width, 4)
        nn.init.zeros_(self.fc3.weight)
        nn.init.zeros_(self.fc3.bias)

    def forward(self, query: Tensor) -> Tensor:
        """(..., D) -> (..., 4), float32 also under autocast."""
        return self.fc3(self.fc2(self.fc1(query, activation="relu"), activation="relu")).float()


class ContrastiveHead(nn.Module):
    """The learned bias of one layer's logits; `contrast` is the rest of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((1,), START_BIAS))


def contrast(query: Tensor, text_memory: Tensor, text_valid: Tensor, bias: Tensor) -> Tensor:
    """Alignment of queries with text tokens: scaled dot product and a learned bias.

    query (..., B, Q, D), text_memory (B, T, D), text_valid (B, T), bias broadcastable to the result
    -> logits (..., B, Q, T), float32, -inf at text padding.
    """
    logits = query @ (text_memory * query.shape[-1] ** -0.5).mT + bias
    return logits.float().masked_fill(~text_valid[:, None], float("-inf"))
