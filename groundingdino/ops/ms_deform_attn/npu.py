"""Deformable attention on an Ascend NPU: CANN's built-in operators through our own binding, or a formulation in torch.

What `groundingdino selfcheck --tune` found to be the fastest on this card is used; without it CANN's.

The binding is `csrc/npu`, built by setup.py where torch_npu is installed, and loaded at the first call on NPU tensors,
so nothing here needs torch_npu or CANN before that.
"""

import functools
import warnings
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundingdino.ops.ms_deform_attn import formulations
from groundingdino.ops.ms_deform_attn.op import pairs
from groundingdino.runtime import tuning
from groundingdino.runtime.kernels import VARIABLE, kernel_mode

HOW_TO_BUILD = "where torch_npu is installed, run `pip install --no-build-isolation -e .` in the repository"


def binding_file() -> Path | None:
    """The built binding, None where setup.py did not build it."""
    candidates = [Path(__file__).parent.with_name(f"_npu{suffix}") for suffix in EXTENSION_SUFFIXES]
    return next((path for path in candidates if path.exists()), None)


@functools.cache
def binding_problem() -> str | None:
    """Loads the binding once. None where it is ready, otherwise why not, in one line."""
    path = binding_file()
    if path is None:
        return f"the binding is not built; {HOW_TO_BUILD}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load ({error}); after a change of torch or torch_npu, {HOW_TO_BUILD}"
    try:
        torch.ops.groundingdino_aclnn.library()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def kernel_problem(value: Tensor, locations: Tensor) -> str | None:
    """Why CANN's operators cannot compute this call; None where they can."""
    return binding_problem() or torch.ops.groundingdino_aclnn.refusal(value, locations) or None


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(f"deformable attention runs as grid_sample on the NPU, which is slow: {problem}", stacklevel=2)


def _binding() -> Any:
    problem = binding_problem()
    if problem is not None:
        raise RuntimeError(problem)
    return torch.ops.groundingdino_aclnn


def _aclnn_forward(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    return _binding().forward(value, _flat(shapes), locations, weights)


def _aclnn_backward(
    grad_output: Tensor, value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _binding().backward(grad_output, value, _flat(shapes), locations, weights)


def _flat(shapes: Sequence[tuple[int, int]]) -> list[int]:
    return [size for shape in shapes for size in shape]


FORWARD = {"aclnn": _aclnn_forward, **formulations.FORWARD}
BACKWARD = {"aclnn": _aclnn_backward, **formulations.BACKWARD}


def formulation(direction: str, value: Tensor, locations: Tensor) -> str:
    """Which of FORWARD or BACKWARD a call gets. RuntimeError where CANN's is required and cannot compute it."""
    mode = kernel_mode("ms_deform_attn")
    if mode == "off":
        return "grid_sample"
    if mode == "auto" and direction == "backward" and torch.are_deterministic_algorithms_enabled():
        return "gather, sorted"  # CANN's then runs on a single core
    measured = tuning.choice(value.device, formulations.operation(direction, value, locations))
    if mode == "auto" and measured in (FORWARD if direction == "forward" else BACKWARD) and measured != "aclnn":
        return measured
    problem = kernel_problem(value, locations)
    if problem is None:
        return "aclnn"
    if mode == "require":
        raise RuntimeError(f"{VARIABLE} requires the kernel of ms_deform_attn, but {problem}")
    _warn_once(problem)
    return "grid_sample"


def _forward(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    compute = FORWARD[formulation("forward", value, locations)]
    return compute(value, pairs(shapes), locations, weights)


def _backward(
    grad_output: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    compute = BACKWARD[formulation("backward", value, locations)]
    return compute(grad_output, value, pairs(shapes), locations, weights)


_LIBRARY = torch.library.Library("groundingdino", "IMPL")
_LIBRARY.impl("ms_deform_attn", _forward, "PrivateUse1")
_LIBRARY.impl("ms_deform_attn_backward", _backward, "PrivateUse1")
