"""Sine encodings. Three uses, three conventions; each is what the released weights were trained with."""

import math

import torch
from torch import Tensor


def sine_features(values: Tensor, num_features: int, temperature: float) -> Tensor:
    """Interleaved sin/cos of `values` at geometrically falling frequencies.

    Args:
        values: (...,) in radians at the highest frequency.
        num_features: length F of the new last axis, even.
        temperature: the lowest frequency is about 1 / temperature.

    Returns:
        (..., F): sin at even, cos at odd places.
    """
    exponents = torch.arange(0, num_features, 2, dtype=torch.float32, device=values.device) / num_features
    angles = values[..., None].float() / temperature**exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def box_encoding(boxes: Tensor, num_features: int) -> Tensor:
    """(B, Q, 4) cxcywh in [0, 1] -> (B, Q, 4 * num_features), order y, x, w, h (mmdet `coordinate_to_encoding`)."""
    features = sine_features(boxes * (2 * math.pi), num_features, temperature=10000)  # (B, Q, 4, F)
    y_first = torch.cat((features[..., 1:2, :], features[..., 0:1, :], features[..., 2:, :]), dim=-2)
    return y_first.flatten(-2)


def text_position_encoding(position_ids: Tensor, width: int) -> Tensor:
    """(B, T) integers -> (B, T, D) (mmdet `get_text_sine_pos_embed`, which scales whole positions by 2 pi)."""
    return sine_features(position_ids * (2 * math.pi), width, temperature=10000)


def pixel_encoding(index: Tensor, extent: Tensor, num_features: int) -> Tensor:
    """Where along one axis of the unpadded image a row or column lies (mmdet `SinePositionalEncoding`).

    index: (B, N) 0, 1, ...; extent: (B, N) how many rows or columns of that map are image -> (B, N, num_features).
    """
    return sine_features((index + 1) / (extent + 1e-6) * (2 * math.pi), num_features, temperature=20)
