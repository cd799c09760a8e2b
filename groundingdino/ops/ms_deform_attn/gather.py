"""Multi-scale deformable attention for machines that copy rows and work on whole vectors, as an Ascend's cores do.

The four pixels around a sample are one row of a table, so a level is sampled by one `index_select`. The gradient of the
value adds such rows up with one `index_add`, or with torch's gradient of an embedding, which sorts the row numbers
first and then needs no atomics (CANN's on Atlas A2 does, and CUDA's).

Axes: B images, S image tokens, M heads, C channels a head, Q queries, L levels, P points, K cells of a level.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SumRows = Callable[[Tensor, Tensor, int], Tensor]


class Level(NamedTuple):
    """One level's samples. A cell is four neighbouring pixels, the level padded by one pixel of zeros on each side."""

    table: Tensor  # (B*M*K, 4*C) pixels of each cell: upper left, upper right, lower left, lower right
    cell: Tensor  # (B*M*Q*P) row of each sample
    right: Tensor  # (B*M, Q, P) how far the sample lies right of the cell's left pixels
    below: Tensor  # (B*M, Q, P)
    moves: Tensor  # (B*M, Q, P, 2) the level's width and height; 0 where the sample is outside
    weight: Tensor  # (B*M, Q, P)

    def pixels(self) -> Tensor:
        """(B*M, Q, P*4, C) the four pixels of every sample."""
        image_heads, queries, points = self.weight.shape
        channels = self.table.shape[1] // 4
        return self.table.index_select(0, self.cell).view(image_heads, queries, points * 4, channels)

    def shares(self) -> Tensor:
        """(B*M, Q, P, 4) what each of the four pixels counts in the sample."""
        left, above = 1 - self.right, 1 - self.below
        return torch.stack((left * above, self.right * above, left * self.below, self.right * self.below), dim=-1)


def ms_deform_attn_gather(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """What `groundingdino.ops.ms_deform_attn` computes, same arguments. Not differentiable: see the next function."""
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    out = value.new_zeros(batch * heads, queries, channels)
    for level in _levels(value, shapes, locations, weights):
        pixels = level.pixels()
        factor = (level.shares() * level.weight[..., None]).flatten(2)
        out += (pixels * factor[..., None]).sum(2)
    return out.view(batch, heads, queries, channels).transpose(1, 2).flatten(2)


def ms_deform_attn_backward_gather(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    sum_rows: SumRows,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights for `grad_output` (B, Q, M*C).

    `sum_rows(rows, index, count)` is `add_rows` or `sort_and_sum_rows`.
    """
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    grad = (
        grad_output.view(batch, queries, heads, channels).transpose(1, 2).reshape(batch * heads, queries, 1, channels)
    )
    by_level = []
    for level, (height, width) in zip(_levels(value, shapes, locations, weights), shapes, strict=True):
        pixels = level.pixels()
        of_pixel = (pixels * grad).sum(-1).view(*level.weight.shape, 4)  # gradient of share times weight
        shares = level.shares()
        across = (of_pixel[..., 1::2] - of_pixel[..., ::2]) * torch.stack((1 - level.below, level.below), dim=-1)
        down = (of_pixel[..., 2:] - of_pixel[..., :2]) * torch.stack((1 - level.right, level.right), dim=-1)
        grad_location = torch.stack((across.sum(-1), down.sum(-1)), dim=-1) * level.weight[..., None] * level.moves
        factor = (shares * level.weight[..., None]).flatten(2)
        rows = (factor[..., None] * grad).view(len(level.cell), 4 * channels)
        table = sum_rows(rows, level.cell, len(level.table)).view(len(grad), height + 1, width + 1, 4, channels)
        by_level.append((_pixels(table), grad_location, (of_pixel * shares).sum(-1)))
    grad_values, grad_locations, grad_weights = zip(*by_level, strict=True)
    by_query = (batch, heads, queries, len(shapes), locations.shape[4])
    return (
        torch.cat(grad_values, dim=1).view(batch, heads, *value.shape[1::2]).transpose(1, 2).contiguous(),
        torch.stack(grad_locations, dim=2).view(*by_query, 2).transpose(1, 2).contiguous(),
        torch.stack(grad_weights, dim=2).view(by_query).transpose(1, 2).contiguous(),
    )


def add_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """(count, D): the sum of the rows (N, D) of each index (N,); on an accelerator by atomics, in any order."""
    return rows.new_zeros(count, rows.shape[1]).index_add_(0, index, rows)


def sort_and_sum_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """As `add_rows`, the way torch computes the gradient of an embedding."""
    return torch.ops.aten.embedding_dense_backward(rows, index, count, -1, False)


def _levels(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Iterator[Level]:
    batch, _, heads, channels = value.shape
    parts = value.transpose(1, 2).split([height * width for height, width in shapes], dim=2)
    image_head = torch.arange(batch * heads, dtype=torch.int32, device=value.device)[:, None, None]
    for number, (part, (height, width)) in enumerate(zip(parts, shapes, strict=True)):
        padded = F.pad(part.reshape(batch * heads, height, width, channels), (0, 0, 1, 1, 1, 1))
        upper, lower = padded[:, :-1], padded[:, 1:]
        corners = (upper[:, :, :-1], upper[:, :, 1:], lower[:, :, :-1], lower[:, :, 1:])
        x, y = locations[:, :, :, number].transpose(1, 2).flatten(0, 1).unbind(-1)  # (B*M, Q, P)
        column, right, inside_x = _along(x, width)
        row, below, inside_y = _along(y, height)
        cell = (image_head * (height + 1) + row) * (width + 1) + column
        yield Level(
            table=torch.cat(corners, dim=-1).flatten(0, 2),
            cell=cell.flatten(),
            right=right,
            below=below,
            moves=torch.stack((inside_x * float(width), inside_y * float(height)), dim=-1),
            weight=weights[:, :, :, number].transpose(1, 2).flatten(0, 1),
        )


def _along(location: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cell of each sample along one side (0 ... size), how far into it, and whether the sample counts at all.

    A sample that does not count, also one at NaN, goes to the padding, where it is zero.
    """
    position = location * size - 0.5
    inside = (position > -1) & (position < size)
    position = torch.where(inside, position, -1.0)
    first = position.floor()
    return first.int() + 1, position - first, inside


def _pixels(table: Tensor) -> Tensor:
    """(B*M, H*W, C) from what each cell (B*M, H+1, W+1, 4, C) gives its four pixels."""
    upper_left, upper_right, lower_left, lower_right = table.unbind(3)
    pixels = upper_left[:, 1:, 1:] + upper_right[:, 1:, :-1] + lower_left[:, :-1, 1:] + lower_right[:, :-1, :-1]
    return pixels.flatten(1, 2)
