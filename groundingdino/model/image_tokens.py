"""The image as the transformer sees it: L feature maps as one row of tokens per image, with their positions.

Axes: B images, H/W pixels, L levels, S image tokens, Q queries, P points, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from groundingdino.model.positions import pixel_encoding
from groundingdino.structures import ImageBatch


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of a batch of images, level after level, each row by row."""

    tokens: Tensor  # (B, S, D)
    position: Tensor  # (B, S, D) sine encoding + level embedding
    valid: Tensor | None  # (B, S) bool, True = real; None where nothing is padded
    valid_ratios: Tensor  # (B, L, 2) share of each padded map that is image, (x, y)
    grid: Tensor  # (B, S, 2) centre of each token in the unpadded image, (x, y) in [0, 1]; beyond 1 in the padding
    level_sizes: Tensor  # (L, 2) width and height of each map, float
    shapes: tuple[tuple[int, int], ...]  # (height, width) of each map, on the host

    def take(self, index: list[int]) -> "ImageTokens":
        """Rows of the batch, in this order, repeats allowed: one image for several captions."""

        def rows(x: Tensor) -> Tensor:
            return x.expand(len(index), *x.shape[1:]) if len(x) == 1 else x[index]

        return replace(
            self,
            tokens=rows(self.tokens),
            position=rows(self.position),
            valid=None if self.valid is None else rows(self.valid),
            valid_ratios=rows(self.valid_ratios),
            grid=rows(self.grid),
        )


@dataclass(frozen=True)
class Sampling:
    """Where deformable attention looks: at centre + offset * scale, in [0, 1] of each level's padded map, (x, y)."""

    centers: Tensor  # broadcastable to (B, Q, L, P, 2)
    scale: Tensor  # likewise: what a predicted offset of 1 is worth


def flatten_levels(levels: Sequence[Tensor], level_embedding: Tensor, images: ImageBatch) -> ImageTokens:
    """The tokens of L maps (B, D, H_l, W_l); level_embedding (L, D)."""
    each = [_flatten_level(x, embedding, images) for x, embedding in zip(levels, level_embedding, strict=True)]
    valid = [level.valid for level in each if level.valid is not None]
    return ImageTokens(
        tokens=torch.cat([level.tokens for level in each], dim=1),
        position=torch.cat([level.position for level in each], dim=1),
        valid=torch.cat(valid, dim=1) if valid else None,
        valid_ratios=torch.cat([level.valid_ratios for level in each], dim=1),
        grid=torch.cat([level.grid for level in each], dim=1),
        level_sizes=torch.cat([level.level_sizes for level in each]),
        shapes=tuple(shape for level in each for shape in level.shapes),
    )


def _flatten_level(features: Tensor, level_embedding: Tensor, images: ImageBatch) -> ImageTokens:
    """The tokens of one map (B, D, H_l, W_l)."""
    # Encodings are separable: compute them per row and per column, then combine.
    height, width = features.shape[2:]
    y = _axis(images.valid[:, :, 0], height, features.shape[1] // 2)
    x = _axis(images.valid[:, 0, :], width, features.shape[1] // 2)
    return ImageTokens(
        tokens=features.flatten(2).mT,
        position=_combine(y.encoding, x.encoding).to(level_embedding.dtype) + level_embedding,
        valid=_combine(y.inside, x.inside).all(dim=-1) if images.padded else None,
        valid_ratios=torch.stack((x.ratio, y.ratio), dim=-1),
        grid=_combine(y.center, x.center).flip(-1),
        level_sizes=torch.cat((x.size, y.size))[None],
        shapes=((height, width),),
    )


@dataclass(frozen=True)
class _Axis:
    """The N rows (or columns) of one map."""

    inside: Tensor  # (B, N, 1) bool, True = inside the image
    center: Tensor  # (B, N, 1) in [0, 1] of the unpadded image
    encoding: Tensor  # (B, N, F)
    ratio: Tensor  # (B, 1) share of the map that is image
    size: Tensor  # (1,) N as a float


def _axis(inside: Tensor, size: int, num_features: int) -> _Axis:
    """inside (B, H) bool: the rows (or columns) of the padded image; size of the map along this axis."""
    # Nearest, as mmdet `detectors/deformable_detr.py::pre_transformer` shrinks its mask.
    shrunk = F.interpolate(inside[:, None].float(), size=size)[:, 0]  # (B, N)
    extent = shrunk.sum(dim=1, keepdim=True)  # (B, 1)
    index = torch.arange(size, device=inside.device, dtype=torch.float32)
    return _Axis(
        inside=(shrunk > 0.5)[..., None],
        center=((index + 0.5) / extent)[..., None],
        encoding=pixel_encoding(index, extent, num_features),
        ratio=extent / size,
        size=extent.new_full((1,), size),
    )


def _combine(rows: Tensor, columns: Tensor) -> Tensor:
    """rows (B, H_l, F) and columns (B, W_l, G) -> (B, H_l * W_l, F + G)."""
    height, width = rows.shape[1], columns.shape[1]
    pair = (rows[:, :, None].expand(-1, -1, width, -1), columns[:, None].expand(-1, height, -1, -1))
    return torch.cat(pair, dim=-1).flatten(1, 2)
