"""Bi-directional attention between image tokens and text tokens (GLIP; mmdet `utils/vlfuse_helper.py`).

Written in the order that costs least. The textbook form projects every image token into the fusion width three times;
with a few text tokens and many thousand image tokens it is cheaper to carry the text into image space instead:
    score  = (Wq v) . k     = v . (Wq' k)
    image  = Wo (P (Wt t))  = P (Wo Wt t)
    text   = Wo (P' (Wv v)) = (Wo Wv) (P' v)
which is the same algebra, with three matmuls over the image tokens fewer.

Axes: B images, S image tokens, T text tokens, D width, M heads, E fusion width per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundingdino.ops import Linear, bmm

SCORE_LIMIT = 50000.0  # mmdet clamps scores here, so that float16 does not overflow


class _Projection(nn.Module):
    """A linear layer's parameters. It is applied to the other factor of a matmul, so it is no `nn.Linear`."""

    def __init__(self, width_in: int, width_out: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.weight = nn.Parameter(torch.empty(width_out, width_in))
        self.bias = nn.Parameter(torch.zeros(width_out))
        nn.init.xavier_uniform_(self.weight)


class ImageQuery(_Projection):
    """Makes queries of image tokens: `(W v + b) . k = v . (W' k) + b . k`."""

    def forward(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Keys in image space (M, R, D), and what each adds to its scores (M, R, 1); key (M, R, E)."""
        weight, bias = self.weight.unflatten(0, (self.num_heads, -1)), self.bias.unflatten(0, (self.num_heads, -1, 1))
        return torch.bmm(key, weight), torch.bmm(key, bias)


class ImageValue(_Projection):
    """Makes values of image tokens: `sum_i p_i (W v_i + b) = W (sum_i p_i v_i) + b sum_i p_i`."""

    def forward(self, pooled: Tensor, mass: Tensor) -> Tensor:
        """(M, R, E) for pooled image tokens (M, R, D) and the sums of their weights (M, R, 1)."""
        weight, bias = self.weight.unflatten(0, (self.num_heads, -1)), self.bias.unflatten(0, (self.num_heads, 1, -1))
        return torch.baddbmm(mass * bias, pooled, weight.mT)


class ImageOut(_Projection):
    """Brings the heads' text values back into image space: `W (sum_t p_t u_t) + b = sum_t p_t (W u_t) + b`."""

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Values in image space (M, R, D) and the bias (D,); value (M, R, E)."""
        weight = self.weight.unflatten(1, (self.num_heads, -1))  # (D, M, E)
        return torch.bmm(value, weight.permute(1, 2, 0)), self.bias


class Fusion(nn.Module):
    """Image tokens look at the text, text tokens look at the image, at once.

    Both residuals start from the *normalised* input, as in mmdet.
    """

    def __init__(self, width: int, fusion_width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.score_scale = (fusion_width // num_heads) ** -0.5
        self.image_norm = nn.LayerNorm(width)
        self.text_norm = nn.LayerNorm(width)
        self.image_query = ImageQuery(width, fusion_width, num_heads)
        self.text_key = Linear(width, fusion_width)
        self.image_value = ImageValue(width, fusion_width, num_heads)
        self.text_value = Linear(width, fusion_width)
        self.image_out = ImageOut(fusion_width, width, num_heads)
        self.text_out = Linear(fusion_width, width)
        self.image_scale = nn.Parameter(torch.full((width,), 1e-4))
        self.text_scale = nn.Parameter(torch.full((width,), 1e-4))
        for linear in (self.text_key, self.text_value, self.text_out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, image: Tensor, text: Tensor, image_valid: Tensor | None, text_valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both, fused: (B, S, D) and (B, T, D).

        image (B, S, D), text (B, T, D), valid (B, S) or None and (B, T), bool, True = real.
        """
        image, text = self.image_norm(image), self.text_norm(text)
        batch, tokens = text.shape[:2]
        heads = self.num_heads

        def by_head(x: Tensor) -> Tensor:  # (B, T, M * E) -> (M, B * T, E)
            return x.view(batch * tokens, heads, -1).transpose(0, 1)

        def by_image(x: Tensor) -> Tensor:  # (M, B * T, .) -> (B, M * T, .)
            return x.unflatten(1, (batch, tokens)).transpose(0, 1).flatten(1, 2)

        # Scores, clamped in place: with many words no tensor here is larger.
        keys, offsets = self.image_query(by_head(self.text_key(text) * self.score_scale))
        scores = bmm(by_image(keys), image.mT, by_image(offsets)).clamp_(-SCORE_LIMIT, SCORE_LIMIT)  # (B, M T, S)

        # What each text token looks at, and each image token
        to_image = scores if image_valid is None else scores.masked_fill(~image_valid[:, None], float("-inf"))
        to_image = F.dropout(to_image.softmax(dim=-1), self.dropout, self.training)
        to_text = scores.masked_fill_(~text_valid.repeat(1, heads)[:, :, None], float("-inf"))
        to_text = to_text.unflatten(1, (heads, tokens)).softmax(dim=2).flatten(1, 2)
        to_text = F.dropout(to_text, self.dropout, self.training)

        # Text to image; the residual's scale goes to the values of the text instead of over all image tokens.
        values, bias = self.image_out(by_head(self.text_value(text)))
        image_delta = bmm(to_text.mT, by_image(values) * self.image_scale, bias * self.image_scale)

        # Image to text; dropout leaves rows that do not sum to one, so the bias is weighed by the row's sum.
        pooled = bmm(to_image, image)  # (B, M T, D)
        mass = to_image.sum(dim=-1, keepdim=True).to(pooled.dtype)  # (B, M T, 1)
        pooled, mass = (x.unflatten(1, (heads, tokens)).transpose(0, 1).flatten(1, 2) for x in (pooled, mass))
        pooled = self.image_value(pooled, mass)  # (M, B T, E)
        text_delta = self.text_out(pooled.transpose(0, 1).reshape(batch, tokens, -1))
        return image + image_delta, torch.addcmul(text, text_delta, self.text_scale)
