"""What turns query features into logits and boxes (mmdet `dense_heads/grounding_dino_head.py`)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundingdino.model.text_encoder import TextContext
from groundingdino.ops import Linear

PRIOR_BIAS = -4.6  # log of the prior probability 0.01


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
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(query))))).float()


class ContrastiveHead(nn.Module):
    """Alignment of queries with text tokens: scaled dot product and a learned bias, and a learned scale if wanted."""

    def __init__(self, learned_scale: bool = False) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((1,), PRIOR_BIAS))
        self.log_scale = nn.Parameter(torch.zeros(1)) if learned_scale else None

    def forward(self, query: Tensor, text: TextContext) -> Tensor:
        """Logits (B, Q, T), float32 also under autocast, -inf at text padding; query (B, Q, D)."""
        if self.log_scale is not None:
            query = query * self.log_scale.exp()
        return alignment_logits(query, text.tokens, self.bias).masked_fill(~text.valid[:, None], float("-inf"))


def alignment_logits(query: Tensor, text_tokens: Tensor, bias: Tensor) -> Tensor:
    """(B, Q, T) float32 for query (B, Q, D), text_tokens (B, T, D) and bias (1,)."""
    return (query @ (text_tokens * query.shape[-1] ** -0.5).mT + bias).float()
