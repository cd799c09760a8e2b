"""What the operators' tests share: outputs with gradients, and how close two computations are."""

from typing import Any

import pytest
import torch
from torch import Tensor

from groundingdino.ops.cpu_library import best_instruction_set, library

HAS_LINEAR_KERNEL = library() is not None and best_instruction_set() >= 1
BEST = -1 if library() is None else best_instruction_set()
EVERY_INSTRUCTION_SET = pytest.mark.parametrize(
    "instruction_set",
    [
        pytest.param(number, marks=pytest.mark.skipif(number > BEST, reason="this processor has no such vectors"))
        for number in range(3)
    ],
)


def upstream(out: Tensor) -> Tensor:
    """A random gradient for an output, the same in every type."""
    return torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out.dtype)


def output_and_gradients(function, *arguments: Any, rounded_to: torch.dtype | None = None) -> list[Tensor]:
    """The output, and the gradient of each argument that is a floating-point tensor.

    `rounded_to` is the type to which the gradient that arrives is rounded first.
    """
    is_leaf = [isinstance(argument, Tensor) and argument.is_floating_point() for argument in arguments]
    given = [a.detach().requires_grad_() if leaf else a for a, leaf in zip(arguments, is_leaf, strict=True)]
    leaves = [a for a, leaf in zip(given, is_leaf, strict=True) if leaf]
    out = function(*given)
    arriving = upstream(out).to(rounded_to or out.dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, arriving)]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Output and gradients in order; the tolerance is a fraction of the largest value."""
    for place, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == b.shape, place
        if b.numel():
            error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-3)
            assert error <= tolerance, f"{place}: {error:.2e}"
