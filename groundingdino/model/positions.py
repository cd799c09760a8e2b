"""Sine encodings. Three uses, three conventions; each is what the released weights were trained with."""

import math

import torch
from torch import Tensor


def sine_features(values: Tensor, num_features: int, temperature: float) -> Tensor:
    """Interleaved sin/cos of `values` at geometrically falling frequencies.

    Args:
        values: (...,) in radians at the highest frequency.
        num_features: length F of the new last axis.
        temperature: the lowest frequency is about 1 / temperature.

    Returns:
        (..., F): sin at even, cos at odd places.
    """
    index = torch.arange(num_features, dtype=torch.float32, device=values.device)
    pair = torch.div(index, 2, rounding_mode="floor")
    angles = values[..., None].float() / temperature ** (2 * pair / num_features)
    return torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1).flatten(-2)


def box_encoding(boxes: Tensor, num_features: int) -> Tensor:
    """(B, Q, 4) cxcywh in [0, 1] -> (B, Q, 4 * num_features), order y, x, w, h (mmdet `coordinate_to_encoding`)."""
    features = sine_features(boxes * (2 * math.pi), num_features, temperature=10000)  # (B, Q, 4, F)
    y_first = torch.cat((features[..., 1:2, :], features[..., 0:1, :], features[..., 2:, :]), dim=-2)
    return y_first.flatten(-2)


def text_position_encoding(position_ids: Tensor, width: int) -> Tensor:
    """(B, T) integers -> (B, T, D) (mmdet `get_text_sine_pos_embed`, which scales whole positions by 2 pi)."""
    return sine_features(position_ids * (2 * math.pi), width, temperature=10000)


def image_position_encoding(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Where in the unpadded image a pixel of a feature map lies (mmdet `SinePositionalEncoding`, temperature 20).

    Args:
        rows: (B, H) bool, True = this row is inside the image.
        columns: (B, W) bool likewise.
        width: D; half encodes y, half x.

    Returns:
        (B, H * W, D).
    """

    def encode(inside: Tensor) -> Tensor:
        steps = inside.cumsum(dim=1, dtype=torch.float32)
        return sine_features(steps / (steps[:, -1:] + 1e-6) * (2 * math.pi), width // 2, temperature=20)

    y, x = encode(rows), encode(columns)  # (B, H, D / 2), (B, W, D / 2)
    batch, height, wide = rows.shape[0], rows.shape[1], columns.shape[1]
    y = y[:, :, None].expand(batch, height, wide, -1)
    x = x[:, None, :].expand(batch, height, wide, -1)
    return torch.cat((y, x), dim=-1).flatten(1, 2)
