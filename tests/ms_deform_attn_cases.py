"""Cases of deformable attention for the tests of every kernel: random arguments, and how exact a result must be."""

import torch
from torch import Tensor

# Largest error as a fraction of the largest value. The two paths add up to 4 * L * P products in different orders and
# compute pixel coordinates differently (x * W - 0.5 here, two more roundings in grid_sample), so a few dozen roundings.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}

# batch, heads, channels, queries, levels, points; the kernel packs the value where queries are many, or channels odd
CASES = {
    "as_in_the_decoder": (1, 8, 32, 50, ((13, 21), (7, 11), (4, 6), (2, 3)), 4),
    "as_in_the_enhancer": (1, 8, 32, 92, ((9, 7), (5, 4), (3, 2), (2, 1)), 4),
    "one_query": (2, 2, 16, 1, ((5, 4), (3, 2)), 4),
    "one_point": (1, 3, 8, 7, ((5, 4), (3, 2)), 1),
    "one_pixel_levels": (1, 2, 8, 5, ((1, 1), (1, 1)), 3),
    "lines": (1, 2, 8, 5, ((1, 9), (9, 1)), 3),
    "five_levels": (2, 3, 32, 9, ((8, 7), (6, 5), (4, 3), (2, 2), (1, 1)), 2),
    "thirteen_channels": (1, 2, 13, 6, ((5, 6), (3, 3)), 2),
    "one_channel": (1, 1, 1, 4, ((3, 3),), 2),
    "channels_beyond_a_block": (1, 2, 72, 6, ((5, 6), (3, 3)), 2),
    "empty_batch": (0, 2, 8, 4, ((3, 3),), 2),
    "no_queries": (2, 2, 8, 0, ((3, 3),), 2),
}


def arguments(case: tuple, dtype: torch.dtype = torch.float64, reach: int = 3) -> tuple:
    """Random (value, shapes, locations, weights); samples up to `reach` pixels outside, none at a bilinear kink."""
    batch, heads, channels, queries, shapes, points = case
    generator = torch.Generator().manual_seed(0)

    def rand(*size: int) -> Tensor:
        return torch.rand(size, dtype=torch.float64, generator=generator)

    value = rand(batch, sum(height * width for height, width in shapes), heads, channels) - 0.5
    sizes = torch.tensor([(width, height) for height, width in shapes])[:, None]  # (L, 1, 2)
    pixels = rand(batch, queries, heads, len(shapes), points, 2) * (sizes + 2 * reach) - reach
    locations = (pixels.floor() + 0.1 + 0.8 * pixels.frac().abs() + 0.5) / sizes
    weights = rand(batch, queries, heads, len(shapes), points)
    return value.to(dtype), shapes, locations.to(dtype), weights.to(dtype)


def flat(shapes: tuple) -> list[int]:
    return [size for shape in shapes for size in shape]
