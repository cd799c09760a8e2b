"""Bi-directional attention between image tokens and text tokens (GLIP; mmdet `utils/vlfuse_helper.py`).

Written in the order that costs least. The textbook form projects every image token into the fusion width three times;
with a few text tokens and many thousand image tokens it is cheaper to carry the text into image space instead:
    score  = (Wq v) . k     = v . (Wq' k)
    image  = Wo (P (Wt t))  = P (Wo Wt t)
    text   = Wo (P' (Wv v)) = (Wo Wv) (P' v)
which is the same algebra, with three products over the image tokens fewer.

Axes: B images, S image tokens, T text tokens, D width, M heads, E fusion width per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundingdino.ops import Linear, bmm

SCORE_LIMIT = 50000.0  # mmdet clamps scores here, so that float16 does not overflow


class Fusion(nn.Module):
    """Image tokens look at the text, text tokens look at the image, at once.

    Both residuals start from the *normalised* input, as in mmdet.
    """

    def __init__(self, width: int, fusion_width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.image_norm = nn.LayerNorm(width)
        self.text_norm = nn.LayerNorm(width)
        self.image_query = Linear(width, fusion_width)
        self.text_key = Linear(width, fusion_width)
        self.image_value = Linear(width, fusion_width)
        self.text_value = Linear(width, fusion_width)
        self.image_out = Linear(fusion_width, width)
        self.text_out = Linear(fusion_width, width)
        self.image_scale = nn.Parameter(torch.full((width,), 1e-4))
        self.text_scale = nn.Parameter(torch.full((width,), 1e-4))
        for linear in (
            self.image_query, self.text_key, self.image_value, self.text_value, self.image_out, self.text_out,
        ):  # fmt: skip
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, image: Tensor, text: Tensor, image_valid: Tensor | None, text_valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """image (B, S, D), text (B, T, D), valid (B, S) or None and (B, T), bool, True = real. Returns both, fused."""
        image, text = self.image_norm(image), self.text_norm(text)
        batch, tokens = text.shape[:2]
        heads = self.num_heads
        scale = (self.image_query.out_features // heads) ** -0.5

        def by_head(x: Tensor) -> Tensor:  # (B, T, M * E) -> (M, B * T, E)
            return x.view(batch * tokens, heads, -1).transpose(0, 1)

        def by_image(x: Tensor) -> Tensor:  # (M, B * T, .) -> (B, M * T, .)
            return x.unflatten(1, (batch, tokens)).transpose(0, 1).flatten(1, 2)

        key = by_head(self.text_key(text) * scale)
        key_in_image_space = by_image(torch.bmm(key, self.image_query.weight.unflatten(0, (heads, -1))))  # (B, M T, D)
        key_offset = by_image(torch.bmm(key, self.image_query.bias.unflatten(0, (heads, -1, 1))))  # (B, M T, 1)
        # In place, as the mask below: with many words no tensor here is larger than the scores.
        scores = bmm(key_in_image_space, image.mT, key_offset).clamp_(-SCORE_LIMIT, SCORE_LIMIT)  # (B, M T, S)

        to_image = scores if image_valid is None else scores.masked_fill(~image_valid[:, None], float("-inf"))
        to_image = F.dropout(to_image.softmax(dim=-1), self.dropout, self.training)
        to_text = scores.masked_fill_(~text_valid.repeat(1, heads)[:, :, None], float("-inf"))
        to_text = to_text.unflatten(1, (heads, tokens)).softmax(dim=2).flatten(1, 2)
        to_text = F.dropout(to_text, self.dropout, self.training)

        # The scale of the residual goes into the small matrix instead of over all image tokens.
        image_out = (self.image_out.weight * self.image_scale[:, None]).unflatten(1, (heads, -1))  # (D, M, E)
        value_in_image_space = by_image(torch.bmm(by_head(self.text_value(text)), image_out.permute(1, 2, 0)))
        image_delta = bmm(to_text.mT, value_in_image_space, self.image_out.bias * self.image_scale)

        pooled = bmm(to_image, image)  # (B, M T, D)
        # Dropout leaves rows that do not sum to one, so the bias is weighed by the row's sum.
        pooled = torch.cat((pooled, to_image.sum(dim=-1, keepdim=True).to(pooled.dtype)), dim=-1)
        pooled = pooled.unflatten(1, (heads, tokens)).transpose(0, 1).flatten(1, 2)  # (M, B T, D + 1)
        value = torch.cat((self.image_value.weight, self.image_value.bias[:, None]), dim=1)  # (M E, D + 1)
        pooled = torch.bmm(pooled, value.unflatten(0, (heads, -1)).mT)  # (M, B T, E)
        text_delta = self.text_out(pooled.transpose(0, 1).reshape(batch, tokens, -1))
        return image + image_delta, torch.addcmul(text, text_delta, self.text_scale)
