"""The windows of a map: padding, roll and partition as lists of token numbers.

They depend on the map's size alone, and for every window and shift they are worked out once a stage, on token numbers
instead of in every block on features. An operator, so that a compiler leaves this arithmetic of integers alone: fused
into what reads it, it would be done again for each pair of places, and takes minutes to compile.

Axes: S tokens of the map, W windows, N places in a window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MASKED = -100.0  # mmdet's "do not look" in a shifted window; its softmax weight vanishes in float32


@dataclass(frozen=True)
class Windows:
    """Where tokens go."""

    token: Tensor  # (W, N) number of the token in a window's place; S in the padding
    place: Tensor  # (S,) number of each token's place among the W * N
    mask: Tensor | None  # (W, N, N) what is added to the scores; None in windows that are not shifted


def ceil_div(size: int, part: int) -> int:
    """How many parts cover the size. Written so that torch.export can reason about sizes that it does not know."""
    return (size + part - 1) // part


def map_windows(height: int, width: int, window: int, shift: int, like: Tensor) -> Windows:
    """The windows of one map, on the device and in the dtype of `like`."""
    token, place, region = torch.ops.groundingdino.window_map(like, height, width, window, shift)

    # Tokens of a window that were no neighbours before the roll do not look at each other
    mask = None
    if shift:
        mask = ((region[:, None, :] != region[:, :, None]) * MASKED).to(like.dtype)  # (W, N, N)
    return Windows(token, place, mask)


def window_map(like: Tensor, height: int, width: int, window: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """`Windows.token`, `Windows.place` and the region (W, N) of each place, on the device of `like`.

    Places of one region were neighbours before the roll; others come from beyond an edge.
    """
    down, across = ceil_div(height, window), ceil_div(width, window)  # windows in a column, and in a row

    # The token at each place (down, across, window, window) of the windows: the padded map is rolled
    row = torch.arange(down * window, device=like.device).roll(-shift).view(down, 1, window, 1)
    column = torch.arange(across * window, device=like.device).roll(-shift).view(across, 1, window)
    real = (row < height) & (column < width)
    token = torch.where(real, row * width + column, height * width).view(-1, window**2)

    # The place of each token; the last is the padding's
    places = torch.arange(down * across * window**2, device=like.device)
    place = places.new_zeros(height * width + 1).scatter(0, token.flatten(), places)[:-1].clone()

    region = (2 * (row < shift) + (column < shift)).view(-1, window**2)
    return token, place, region


torch.library.define(
    "groundingdino::window_map",
    "(Tensor like, SymInt height, SymInt width, int window, int shift) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("groundingdino::window_map", "default")(window_map)


@torch.library.register_fake("groundingdino::window_map")
def _fake(like: Tensor, height: int, width: int, window: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    count = ceil_div(height, window) * ceil_div(width, window)
    sizes = (count, window**2), (height * width,), (count, window**2)
    return tuple(torch.empty(size, dtype=torch.int64, device=like.device) for size in sizes)  # type: ignore[return-value]
