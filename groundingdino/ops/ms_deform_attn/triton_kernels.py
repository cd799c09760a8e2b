"""The Triton kernels of multi-scale deformable attention, and their launches. Imported where used: it needs triton.

One program computes BLOCK_Q queries of one head of one image, all its channels; channels lie along a warp, so that the
four pixels of a sample are read (and their gradients added) in whole cache lines. Values may be in half precision;
pixel positions, products and sums are float32.

Axes: B images, S image tokens, M heads, C channels a head, Q queries, L levels, P points.
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton compiles a kernel anew for an integer argument that is 1 and for one that 16 divides. An image's level sizes
# are both now and then, so they are passed as 2 * size + 1, which is neither.
UNSPECIALIZED = ["heads", "queries", "points"]


@triton.jit
def _pixels(location, live, height, width):
    """Upper-left pixel of each sample, how far behind it the sample lies, and which of the four pixels exist.

    A sample that is not live has none.
    """
    x = tl.load(location, mask=live, other=-1.0) * width - 0.5
    y = tl.load(location + 1, mask=live, other=-1.0) * height - 0.5
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)  # false for NaN, so no index is made of it
    x = tl.where(inside, x, 0.0)
    y = tl.where(inside, y, 0.0)
    left = tl.floor(x)
    top = tl.floor(y)
    column = left.to(tl.int32)
    row = top.to(tl.int32)
    has_left = inside & (column >= 0)
    has_right = inside & (column + 1 < width)
    has_top = row >= 0
    has_bottom = row + 1 < height
    exists = (has_left & has_top, has_right & has_top, has_left & has_bottom, has_right & has_bottom)
    return row * width + column, x - left, y - top, exists


@triton.jit
def _load(row, mask, channel, CHANNELS: tl.constexpr):
    """(BLOCK_Q, BLOCK_C) float32: each row's channels, zeros where the mask is false."""
    return tl.load(row[:, None] + channel[None, :], mask=mask[:, None] & (channel < CHANNELS)[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def _place(heads, queries, BLOCK_Q: tl.constexpr):
    """This program's image, head and queries."""
    program = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_Q)
    image_head = program // blocks
    query = (program % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return (image_head // heads).to(tl.int64), image_head % heads, query


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    value,  # (B, S, M, C), channels contiguous
    locations,  # (B, Q, M, L, P, 2) contiguous float32
    weights,  # (B, Q, M, L, P) contiguous float32
    out,  # (B, Q, M, C) contiguous
    sizes,  # 2L integers: 2 * height + 1 and 2 * width + 1 of each level
    stride_image,
    stride_token,
    stride_head,
    heads,
    queries,
    points,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, head, query = _place(heads, queries, BLOCK_Q)
    channel = tl.arange(0, BLOCK_C)
    live = query < queries
    row = image * queries * heads + query * heads + head  # of out, locations and weights
    level_start = value + image * stride_image + head * stride_head
    total = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)

    for level in tl.static_range(LEVELS):
        height = sizes[2 * level] >> 1
        width = sizes[2 * level + 1] >> 1
        for point in range(points):
            # Where the sample lies
            sample = row * (LEVELS * points) + level * points + point
            weight = tl.load(weights + sample, mask=live, other=0.0)
            token, fx, fy, exists = _pixels(locations + 2 * sample, live, height, width)

            # Its four pixels, weighted
            pixel = level_start + token * stride_token
            total += (weight * (1 - fx) * (1 - fy))[:, None] * _load(pixel, exists[0], channel, CHANNELS)
            total += (weight * fx * (1 - fy))[:, None] * _load(pixel + stride_token, exists[1], channel, CHANNELS)
            pixel += width * stride_token
            total += (weight * (1 - fx) * fy)[:, None] * _load(pixel, exists[2], channel, CHANNELS)
            total += (weight * fx * fy)[:, None] * _load(pixel + stride_token, exists[3], channel, CHANNELS)
        level_start += height * width * stride_token

    mask = live[:, None] & (channel < CHANNELS)[None, :]
    tl.store(out + row[:, None] * CHANNELS + channel[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add(grad_row, contribution, mask, channel, scale, CHANNELS: tl.constexpr, DETERMINISTIC: tl.constexpr):
    """Adds to each row of grad_value: float32, or multiples of 1 / scale as integers, whose sum knows no order."""
    if DETERMINISTIC:
        contribution = (contribution * scale).to(tl.int64)
    tl.atomic_add(
        grad_row[:, None] + channel[None, :],
        contribution,
        mask=mask[:, None] & (channel < CHANNELS)[None, :],
        sem="relaxed",
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_kernel(
    grad_out,  # (B, Q, M, C) contiguous
    value,  # as in the forward kernel, like locations, weights and sizes
    locations,
    weights,
    grad_value,  # (B, S, M, C) contiguous zeros, float32 or, if DETERMINISTIC, int64
    grad_locations,  # contiguous float32, like grad_weights
    grad_weights,
    scale,  # one float32, used if DETERMINISTIC
    sizes,
    stride_image,
    stride_token,
    stride_head,
    tokens,
    heads,
    queries,
    points,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, head, query = _place(heads, queries, BLOCK_Q)
    channel = tl.arange(0, BLOCK_C)
    live = query < queries
    row = image * queries * heads + query * heads + head
    level_start = value + image * stride_image + head * stride_head
    grad_stride = heads * CHANNELS
    grad_level_start = grad_value + image * tokens * grad_stride + head * CHANNELS
    grad = _load(grad_out + row * CHANNELS, live, channel, CHANNELS)
    factor = tl.load(scale) if DETERMINISTIC else 1.0

    for level in tl.static_range(LEVELS):
        height = sizes[2 * level] >> 1
        width = sizes[2 * level + 1] >> 1
        for point in range(points):
            # Where the sample lies
            sample = row * (LEVELS * points) + level * points + point
            weight = tl.load(weights + sample, mask=live, other=0.0)
            token, fx, fy, exists = _pixels(locations + 2 * sample, live, height, width)

            # Its four pixels' products with the output's gradient, summed over channels
            pixel = level_start + token * stride_token
            below = pixel + width * stride_token
            upper_left = tl.sum(_load(pixel, exists[0], channel, CHANNELS) * grad, axis=1)
            upper_right = tl.sum(_load(pixel + stride_token, exists[1], channel, CHANNELS) * grad, axis=1)
            lower_left = tl.sum(_load(below, exists[2], channel, CHANNELS) * grad, axis=1)
            lower_right = tl.sum(_load(below + stride_token, exists[3], channel, CHANNELS) * grad, axis=1)

            # Gradients of the weight and of the location
            upper = upper_left * (1 - fx) + upper_right * fx
            lower = lower_left * (1 - fx) + lower_right * fx
            along_x = (upper_right - upper_left) * (1 - fy) + (lower_right - lower_left) * fy
            tl.store(grad_weights + sample, upper * (1 - fy) + lower * fy, mask=live)
            tl.store(grad_locations + 2 * sample, weight * along_x * width, mask=live)
            tl.store(grad_locations + 2 * sample + 1, weight * (lower - upper) * height, mask=live)

            # Gradients of the pixels
            to = grad_level_start + token * grad_stride
            part = grad * (weight * (1 - fx) * (1 - fy))[:, None]
            _add(to, part, exists[0], channel, factor, CHANNELS, DETERMINISTIC)
            part = grad * (weight * fx * (1 - fy))[:, None]
            _add(to + grad_stride, part, exists[1], channel, factor, CHANNELS, DETERMINISTIC)
            to += width * grad_stride
            part = grad * (weight * (1 - fx) * fy)[:, None]
            _add(to, part, exists[2], channel, factor, CHANNELS, DETERMINISTIC)
            part = grad * (weight * fx * fy)[:, None]
            _add(to + grad_stride, part, exists[3], channel, factor, CHANNELS, DETERMINISTIC)
        level_start += height * width * stride_token
        grad_level_start += height * width * grad_stride


class Launch(NamedTuple):
    """A program's size: (query, channel) elements of its tile, and its warps."""

    elements: int
    warps: int


# Four elements a thread: one 16-byte load of float32 a pixel, 28 to 64 registers, no spills (what compilers report;
# times on a card have not been measured). The first prefix that fits an architecture counts.
LAUNCHES = {
    "gfx": (Launch(1024, 4), Launch(1024, 4)),  # forward, backward; a wave has 64 threads
    "sm_": (Launch(512, 4), Launch(256, 2)),
}
# What `groundingdino selfcheck --tune` measures on a card, the launches above among them: two to eight elements a
# thread. The backward kernel spills 8 bytes with some.
CANDIDATES = {
    f"{elements} elements, {warps} warps": Launch(elements, warps)
    for elements, warps in ((256, 2), (256, 4), (512, 2), (512, 4), (1024, 4), (1024, 8))
}


def launch_options(architecture: str, channels: int, backward: bool, measured: str | None = None) -> dict[str, int]:
    """BLOCK_Q, BLOCK_C and num_warps: of the candidate that was measured, or for the architecture (`sm_90`, `gfx942`).

    A name that is no candidate's, as of another version, counts as None.
    """
    launches = next((each for prefix, each in LAUNCHES.items() if architecture.startswith(prefix)), LAUNCHES["sm_"])
    launch = CANDIDATES.get(measured or "", launches[backward])
    block = triton.next_power_of_2(channels)
    return {"BLOCK_Q": max(1, launch.elements // block), "BLOCK_C": block, "num_warps": launch.warps}


def architecture(device: torch.device) -> str:
    """`gfx942`, `sm_90`; the CPU, where only Triton's interpreter runs, counts as `sm_80`."""
    if device.type != "cuda":
        return "sm_80"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def forward(
    value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor, measured: str | None = None
) -> Tensor:
    """The operator's output, (B, Q, M*C) of value's dtype: value float32, bfloat16 or float16, the rest float32.

    `measured` as in `launch_options`.
    """
    batch, _, heads, channels = value.shape
    _, queries, _, levels, points = weights.shape
    out = value.new_empty(batch, queries, heads * channels)
    if out.numel() == 0:
        return out
    value = _addressable(value)
    options = launch_options(architecture(value.device), channels, False, measured)
    with _on(value.device):
        forward_kernel[_grid(weights, options)](
            value,
            locations.contiguous(),
            weights.contiguous(),
            out,
            _unspecialized(shapes),
            *value.stride()[:3],
            heads,
            queries,
            points,
            CHANNELS=channels,
            LEVELS=levels,
            **options,
        )
    return out


def backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    measured: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value (in its dtype), locations and weights; `measured` as in `launch_options`.

    The value's gradient is summed by atomics in float32, in any order; under `torch.use_deterministic_algorithms` in
    64-bit integers, whose sum is the same in every order (and NaN throughout where a gradient is not finite).
    """
    batch, tokens, heads, channels = value.shape
    _, queries, _, levels, points = weights.shape
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_value = torch.zeros(value.shape, dtype=torch.int64 if deterministic else torch.float32, device=value.device)
    grad_locations = torch.zeros(locations.shape, dtype=locations.dtype, device=value.device)
    grad_weights = torch.zeros(weights.shape, dtype=weights.dtype, device=value.device)
    if grad_output.numel() == 0:
        return grad_value.to(value.dtype), grad_locations, grad_weights
    value = _addressable(value)
    scale = _integer_scale(grad_output, weights) if deterministic else grad_weights  # not read there
    options = launch_options(architecture(value.device), channels, True, measured)
    with _on(value.device):
        backward_kernel[_grid(weights, options)](
            grad_output.contiguous(),
            value,
            locations.contiguous(),
            weights.contiguous(),
            grad_value,
            grad_locations,
            grad_weights,
            scale,
            _unspecialized(shapes),
            *value.stride()[:3],
            tokens,
            heads,
            queries,
            points,
            CHANNELS=channels,
            LEVELS=levels,
            DETERMINISTIC=deterministic,
            **options,
        )
    if deterministic:
        grad_value = grad_value.float() / scale
    return grad_value.to(value.dtype), grad_locations, grad_weights


def _addressable(value: Tensor) -> Tensor:
    """The value with contiguous channels, and an image's last element within reach of 32 bits."""
    reach = sum((size - 1) * stride for size, stride in zip(value.shape[1:], value.stride()[1:], strict=True))
    return value if value.stride(3) == 1 and reach < 2**31 else value.contiguous()


def _unspecialized(shapes: Sequence[int]) -> tuple[int, ...]:
    return tuple(2 * size + 1 for size in shapes)


def _grid(weights: Tensor, options: dict[str, int]) -> tuple[int]:
    batch, queries, heads = weights.shape[:3]
    return (batch * heads * triton.cdiv(queries, options["BLOCK_Q"]),)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever its arguments' is."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _integer_scale(grad_output: Tensor, weights: Tensor) -> Tensor:
    """The largest power of two that keeps every sum of the value's gradient below 2**62; NaN if one is not finite."""
    most_samples = weights.shape[1] * weights.shape[4]  # of one pixel
    bound = grad_output.abs().amax().double() * weights.abs().amax().double() * most_samples
    exponent = torch.frexp(bound).exponent
    scale = torch.ldexp(torch.ones_like(bound), (62 - exponent).clamp(-126, 126))
    return torch.where(bound.isfinite(), scale, torch.nan).float()
