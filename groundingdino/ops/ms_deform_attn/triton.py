"""Deformable attention on CUDA and ROCm devices: our Triton kernels, or the composite where Triton cannot run.

Triton comes with torch's Linux wheels. It is imported at the first call on such a device; it then compiles each kernel
once (it needs a C compiler, gcc or clang, for the launcher) and keeps it in its cache on disk.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from groundingdino.ops.ms_deform_attn import formulations
from groundingdino.ops.ms_deform_attn.op import pairs
from groundingdino.ops.ms_deform_attn.reference import ms_deform_attn_backward_reference, ms_deform_attn_reference
from groundingdino.runtime import tuning
from groundingdino.runtime.kernels import VARIABLE, kernel_mode

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def kernel_problem(device: torch.device, dtype: torch.dtype, channels: int, levels: int, backward: bool) -> str | None:
    """Why the kernel cannot run on this device, in one line; None where it can. Compiles it and runs it once."""
    value = torch.zeros(1, levels, 1, channels, dtype=dtype, device=device)
    locations = torch.zeros(1, 1, 1, levels, 1, 2, device=device)
    weights = torch.zeros(1, 1, 1, levels, 1, device=device)
    arguments = (value, [1] * (2 * levels), locations, weights)
    try:
        from groundingdino.ops.ms_deform_attn import triton_kernels

        if backward:
            triton_kernels.backward(value[:, 0], *arguments)
        else:
            triton_kernels.forward(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the import, either compiler, the driver or the launch may raise
        return f"{type(error).__name__}: {(str(error).strip() or '(no message)').splitlines()[0]}"
    return None


def _size_problem(value: Tensor, locations: Tensor) -> str | None:
    if value.dtype not in KERNEL_DTYPES:
        return f"the kernel takes float32, bfloat16 and float16, not {value.dtype}"
    if max(value[:1].numel(), locations[:1].numel()) >= 2**31:
        return "one image's value or locations have 2**31 or more elements"
    return None


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(f"deformable attention runs as grid_sample on the GPU, which is slow: {problem}", stacklevel=2)


def _uses_kernel(value: Tensor, locations: Tensor, backward: bool) -> bool:
    mode = kernel_mode("ms_deform_attn")
    if mode == "off":
        return False
    problem = _size_problem(value, locations) or kernel_problem(
        value.device, value.dtype, value.shape[3], locations.shape[3], backward
    )
    if problem is None:
        return True
    if mode == "require":
        raise RuntimeError(f"{VARIABLE} requires the kernel of ms_deform_attn, but {problem}")
    _warn_once(problem)
    return False


def forward(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """(B, Q, M*C) of value's dtype. The operator on a GPU: value float64 or any type of KERNEL_DTYPES.

    Locations and weights are float64 if value is, else float32.
    """
    if _uses_kernel(value, locations, backward=False):
        from groundingdino.ops.ms_deform_attn import triton_kernels

        measured = tuning.choice(value.device, formulations.operation("forward", value, locations))
        return triton_kernels.forward(value, shapes, locations, weights, measured)
    sampled = value.to(locations.dtype)
    return ms_deform_attn_reference(sampled, pairs(shapes), locations, weights).to(value.dtype)


def backward(
    grad_output: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, each in its dtype; as `forward`."""
    if _uses_kernel(value, locations, backward=True):
        from groundingdino.ops.ms_deform_attn import triton_kernels

        measured = tuning.choice(value.device, formulations.operation("backward", value, locations))
        return triton_kernels.backward(grad_output, value, shapes, locations, weights, measured)
    grad, sampled = grad_output.to(locations.dtype), value.to(locations.dtype)
    grads = ms_deform_attn_backward_reference(grad, sampled, pairs(shapes), locations, weights)
    return grads[0].to(value.dtype), grads[1], grads[2]


def launches() -> dict[str, Mapping[str, Callable]]:
    """By direction and name the kernel with every launch worth measuring; arguments as the operator's references."""
    from groundingdino.ops.ms_deform_attn import triton_kernels

    def forward_as(
        name: str, value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
    ) -> Tensor:
        return triton_kernels.forward(value, _flat(shapes), locations, weights, name)

    def backward_as(
        name: str, grad: Tensor, value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return triton_kernels.backward(grad, value, _flat(shapes), locations, weights, name)

    names = triton_kernels.CANDIDATES
    return {
        "forward": {name: partial(forward_as, name) for name in names},
        "backward": {name: partial(backward_as, name) for name in names},
    }


def _flat(shapes: Sequence[tuple[int, int]]) -> list[int]:
    return [size for shape in shapes for size in shape]


_LIBRARY = torch.library.Library("groundingdino", "IMPL")
_LIBRARY.impl("ms_deform_attn", forward, "CUDA")
_LIBRARY.impl("ms_deform_attn_backward", backward, "CUDA")
