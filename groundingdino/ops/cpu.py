"""The compiled CPU kernel of multi-scale deformable attention, called through ctypes.

`setup.py` builds `csrc/cpu` into a plain shared library beside this file. Without it (no compiler at installation) the
operators run the composite of `reference.py`, and say once how to get the kernel.
"""

import ctypes
import functools
import warnings
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from groundingdino.ops.ms_deform_attn import check_arguments, pairs, requested_backend
from groundingdino.ops.reference import ms_deform_attn_backward_reference, ms_deform_attn_reference

HOW_TO_BUILD = "with GCC or Clang installed, run `pip install --no-deps --force-reinstall -e .` in the repository"
_SUFFIXES = {torch.float32: "float", torch.float64: "double"}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The built kernel, or None where it is missing; then one warning says how to build it."""
    candidates = [Path(__file__).with_name(f"_msda_cpu{suffix}") for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in candidates if path.exists()), None)
    problem = "its kernel is not built"
    if path is not None:
        try:
            return _declare(ctypes.CDLL(str(path)))
        except (OSError, AttributeError) as error:  # another platform's file, or an older build's
            problem = str(error)
    warnings.warn(f"deformable attention runs as grid_sample, which is slow: {problem}; {HOW_TO_BUILD}", stacklevel=2)
    return None


def _declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    for name in ("msda_best_isa", "msda_forward_workspace", "msda_backward_workspace"):
        getattr(loaded, name).restype = ctypes.c_int64
    for name in ("msda_forward", "msda_backward"):
        for suffix in _SUFFIXES.values():
            getattr(loaded, f"{name}_{suffix}").restype = None
    return loaded


def best_instruction_set() -> int:
    """The fastest of the kernel that this processor has: 0 portable vectors, 1 AVX2 with FMA. Needs `library()`."""
    return library().msda_best_isa()


def forward(
    value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor, instruction_set: int | None = None
) -> Tensor:
    """The kernel for float32 or float64 tensors on the CPU; arguments as the operator's. Needs `library()`.

    `instruction_set` is at most `best_instruction_set()`, which it is if None.
    """
    check_arguments(value, shapes, locations, weights)
    batch, _, heads, channels = value.shape
    out = value.new_empty(batch, locations.shape[1], heads * channels)
    if out.numel() == 0:
        return out
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    sizes = _sizes(value, shapes, locations)
    workspace = value.new_empty(library().msda_forward_workspace(sizes))
    _call("msda_forward", sizes, instruction_set, (value, locations, weights, workspace, out))
    return out


def backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    instruction_set: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights; as `forward`."""
    check_arguments(value, shapes, locations, weights)
    if grad_output.numel() == 0:
        return torch.zeros_like(value), torch.zeros_like(locations), torch.zeros_like(weights)
    inputs = [tensor.contiguous() for tensor in (grad_output, value, locations, weights)]
    grads = tuple(torch.empty_like(tensor) for tensor in inputs[1:])
    sizes = _sizes(value, shapes, locations)
    workspace = value.new_empty(library().msda_backward_workspace(sizes))
    _call("msda_backward", sizes, instruction_set, (*inputs, workspace, *grads))
    return grads


def _sizes(value: Tensor, shapes: Sequence[int], locations: Tensor) -> ctypes.Array:
    batch, tokens, heads, channels = value.shape
    _, queries, _, levels, points, _ = locations.shape
    numbers = (batch, tokens, heads, channels, queries, levels, points, torch.get_num_threads(), *shapes)
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _call(name: str, sizes: ctypes.Array, instruction_set: int | None, tensors: Sequence[Tensor]) -> None:
    function = getattr(library(), f"{name}_{_SUFFIXES[tensors[0].dtype]}")
    instruction_set = best_instruction_set() if instruction_set is None else instruction_set
    function(sizes, ctypes.c_int64(instruction_set), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors))


def _use_kernel(tensor: Tensor) -> bool:
    return tensor.dtype in _SUFFIXES and requested_backend() != "composite" and library() is not None


@torch.library.impl("groundingdino::ms_deform_attn", "cpu")
def _forward_cpu(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    if _use_kernel(value):
        return forward(value, shapes, locations, weights)
    return ms_deform_attn_reference(value, pairs(shapes), locations, weights)


@torch.library.impl("groundingdino::ms_deform_attn_backward", "cpu")
def _backward_cpu(
    grad_output: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if _use_kernel(value):
        return backward(grad_output, value, shapes, locations, weights)
    return ms_deform_attn_backward_reference(grad_output, value, pairs(shapes), locations, weights)
