"""Multi-scale deformable attention: the public function, one operator schema for all devices, its autograd.

Kernels register themselves on `groundingdino::ms_deform_attn` and `groundingdino::ms_deform_attn_backward`: the CPU's
in `cpu.py`, CUDA's and ROCm's in `triton.py`, an NPU's in `npu.py`. A device without a kernel runs the composite of
`reference.py`.

Axes: B images, S image tokens, M heads, C channels a head, Q queries, L levels, P points.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from groundingdino.ops.ms_deform_attn.reference import ms_deform_attn_backward_reference, ms_deform_attn_reference
from groundingdino.runtime.kernels import VARIABLE, kernel_mode

SCHEMA = "(Tensor value, SymInt[] shapes, Tensor locations, Tensor weights) -> Tensor"
BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor value, SymInt[] shapes, Tensor locations, Tensor weights) -> (Tensor, Tensor, Tensor)"
)

READ_AS_IT_IS = {"cpu": (torch.bfloat16,), "cuda": (torch.bfloat16, torch.float16)}  # by the device's kernel


def ms_deform_attn(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Each query sums bilinear samples of every level, weighted (Zhu et al. 2021, Deformable DETR, formula 2).

    Args:
        value: (B, S, M, C) projected image tokens, levels one after another, each row by row.
        shapes: (height, width) of the L levels as host integers; their products sum to S.
        locations: (B, Q, M, L, P, 2) as (x, y), 0 and 1 at the outer edges of the first and last pixel, so a pixel's
            centre is (i + 0.5) / size. Outside, a level is zero. Infinite and NaN locations
            sample zero in the CPU kernel and may give NaN in the composite; nothing is ever read out of bounds.
        weights: (B, Q, M, L, P), usually a softmax over L * P.

    Returns:
        (B, Q, M*C) of value's dtype. Computed in float32 (float64 if value is float64), whatever comes in and also
        under autocast; keep locations in float32, bfloat16 cannot tell neighbouring pixels apart.

    Raises:
        ValueError: if shapes, sizes or devices do not fit together.

    `GROUNDINGDINO_KERNELS` chooses between the device's kernel and grid_sample; see `groundingdino.runtime.kernels`.
    """
    flat_shapes = [size for shape in shapes for size in shape]
    check_arguments(value, flat_shapes, locations, weights)
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    given = value if value.dtype in READ_AS_IT_IS.get(value.device.type, ()) else value.to(dtype)
    out = torch.ops.groundingdino.ms_deform_attn(given, flat_shapes, locations.to(dtype), weights.to(dtype))
    return out.to(value.dtype)


def pairs(flat_shapes: Sequence[int]) -> list[tuple[int, int]]:
    """[h0, w0, h1, w1, ...] -> [(h0, w0), (h1, w1), ...]."""
    return list(zip(flat_shapes[::2], flat_shapes[1::2], strict=True))


def check_arguments(value: Tensor, flat_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> None:
    """Every size that two arguments share must agree; kernels rely on it.

    Raises:
        ValueError: with the sizes seen.
    """
    if value.dim() != 4 or locations.dim() != 6 or weights.dim() != 5 or locations.shape[-1] != 2:
        raise ValueError(
            "ms_deform_attn takes value (B, S, M, C), locations (B, Q, M, L, P, 2) and weights (B, Q, M, L, P), got "
            f"{tuple(value.shape)}, {tuple(locations.shape)} and {tuple(weights.shape)}"
        )
    batch, tokens, heads, _ = value.shape
    if len(flat_shapes) % 2 or not flat_shapes or any(size < 1 for size in flat_shapes):
        raise ValueError(f"ms_deform_attn takes (height, width) >= 1 for each level, got sizes {list(flat_shapes)}")
    levels = pairs(flat_shapes)
    covered = sum(height * width for height, width in levels)
    if covered != tokens:
        raise ValueError(f"the levels {levels} have {covered} tokens, but value {tuple(value.shape)} has {tokens}")
    if locations.shape[:5] != weights.shape:
        raise ValueError(
            f"locations {tuple(locations.shape)} and weights {tuple(weights.shape)} differ in B, Q, M, L or P"
        )
    if (locations.shape[0], locations.shape[2], locations.shape[3]) != (batch, heads, len(levels)):
        raise ValueError(
            f"value {tuple(value.shape)} and {len(levels)} levels need locations ({batch}, Q, {heads}, {len(levels)}, "
            f"P, 2), got {tuple(locations.shape)}"
        )
    if not (value.device == locations.device == weights.device):
        raise ValueError(
            "value, locations and weights must share a device, got "
            f"{value.device}, {locations.device} and {weights.device}"
        )


torch.library.define("groundingdino::ms_deform_attn", SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
torch.library.define("groundingdino::ms_deform_attn_backward", BACKWARD_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl("groundingdino::ms_deform_attn", "default")
def _composite(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    if kernel_mode("ms_deform_attn") == "require":
        raise RuntimeError(f"{VARIABLE} requires the kernel of ms_deform_attn, but {value.device.type} has none")
    return ms_deform_attn_reference(value, pairs(shapes), locations, weights)


@torch.library.impl("groundingdino::ms_deform_attn_backward", "default")
def _composite_backward(
    grad_output: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return ms_deform_attn_backward_reference(grad_output, value, pairs(shapes), locations, weights)


@torch.library.register_fake("groundingdino::ms_deform_attn")
def _fake(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, locations.shape[1], heads * channels)


@torch.library.register_fake("groundingdino::ms_deform_attn_backward")
def _fake_backward(
    grad_output: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    value, shapes, locations, weights = inputs
    ctx.shapes = list(shapes)
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    grads = torch.ops.groundingdino.ms_deform_attn_backward(grad_output, value, ctx.shapes, locations, weights)
    return grads[0], None, grads[1], grads[2]


torch.library.register_autograd("groundingdino::ms_deform_attn", _backward, setup_context=_setup_context)
