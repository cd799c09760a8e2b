"""The compiled CPU kernels, called through ctypes.

`setup.py` builds `csrc/cpu` into a plain shared library beside this file. Without it (no compiler at installation) the
operators run as plain torch, and say once how to get the kernels.
"""

import ctypes
import functools
import warnings
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from groundingdino.runtime.kernels import VARIABLE, Operator, kernel_mode

HOW_TO_BUILD = "with GCC or Clang installed, run `pip install --no-deps --force-reinstall -e .` in the repository"
_SUFFIXES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}
_KERNELS = {
    **dict.fromkeys(("msda_forward", "window_forward"), ("float", "double", "bfloat16")),
    **dict.fromkeys(("msda_backward", "window_backward"), ("float", "double")),
    **dict.fromkeys(("linear", "feed_forward"), ("float",)),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The built kernels, or None where they are missing; then one warning says how to build them."""
    candidates = [Path(__file__).with_name(f"_cpu_kernels{suffix}") for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in candidates if path.exists()), None)
    problem = "its kernels are not built"
    if path is not None:
        try:
            return _declare(ctypes.CDLL(str(path)))
        except (OSError, AttributeError) as error:  # another platform's file, or an older build's
            problem = str(error)
    warnings.warn(f"the model runs as plain torch on the CPU, which is slow: {problem}; {HOW_TO_BUILD}", stacklevel=2)
    return None


def _declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    loaded.best_isa.restype = ctypes.c_int64
    for name, types in _KERNELS.items():
        getattr(loaded, f"{name}_workspace").restype = ctypes.c_int64
        for suffix in types:
            getattr(loaded, f"{name}_{suffix}").restype = None
    return loaded


def best_instruction_set() -> int:
    """The fastest kernels for this processor: 0 portable vectors, 1 AVX2 with FMA, 2 AVX-512. Needs `library()`."""
    loaded = library()
    assert loaded is not None
    return loaded.best_isa()


def has_cpu_kernel(operator: Operator, dtype: torch.dtype) -> bool:
    """Whether the CPU's kernel of an operator computes tensors of this type; see `runtime.kernels`.

    Raises:
        RuntimeError: the kernel is required and not built.
    """
    mode = kernel_mode(operator)
    if mode == "off" or dtype not in _SUFFIXES:
        return False
    if library() is None and mode == "require":
        raise RuntimeError(f"{VARIABLE} requires the kernel of {operator}, but the CPU's are not built; {HOW_TO_BUILD}")
    return library() is not None


def workspace_size(kernel: str, sizes: Sequence[int]) -> int:
    """Elements of the workspace that a kernel asks for."""
    return getattr(library(), f"{kernel}_workspace")(_numbers(sizes))


def call(kernel: str, sizes: Sequence[int], instruction_set: int | None, tensors: Sequence[Tensor | None]) -> None:
    """Run a kernel of csrc/cpu on contiguous tensors, of which the first names the type; None is a null pointer.

    `instruction_set` is at most `best_instruction_set()`, which it is if None.
    """
    assert tensors[0] is not None
    function = getattr(library(), f"{kernel}_{_SUFFIXES[tensors[0].dtype]}")
    instruction_set = best_instruction_set() if instruction_set is None else instruction_set
    pointers = (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)
    function(_numbers(sizes), ctypes.c_int64(instruction_set), *pointers)


def _numbers(sizes: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(sizes))(*sizes)
