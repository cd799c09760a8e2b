"""Linear layers: oneDNN's products for float32 on CPUs, torch's own elsewhere."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Activation = Literal["none", "relu", "gelu"]
# MKL comes with builds for x86 only; elsewhere oneDNN's float32 products have not been measured.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
MANY_ROWS = 256  # from which on copying the weight costs little


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "none") -> Tensor:
    """`F.linear` and the activation behind it; "gelu" is the exact one, by the error function.

    A float32 product on an x86 CPU is oneDNN's: it adds the bias and applies the activation while a result is in the
    registers (torch's own product first copies the bias into the output, and the activation is another pass over it),
    and with AVX-512 its products are faster, too.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        activation: none, relu or gelu.

    Returns:
        (..., out).
    """
    if not by_onednn(x, weight):
        out = F.linear(x, weight, bias)
        return out if activation == "none" else F.relu(out) if activation == "relu" else F.gelu(out)
    if not torch.is_grad_enabled():
        return _product(x, weight, bias, activation)
    if activation == "gelu":  # its gradient needs what went into it
        return F.gelu(_Product.apply(x, weight, bias, "none"))
    return _Product.apply(x, weight, bias, activation)


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor, activation: Activation = "none") -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias, activation)


class LastLinear(nn.Linear):
    """The last product of a block whose activations may be computed again in the backward pass.

    torch's own product keeps its inputs *before* it computes, and recomputation stops when the last input is there; so
    under autograd this one is torch's, and is never computed twice.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return super().forward(x) if torch.is_grad_enabled() else linear(x, self.weight, self.bias)


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is oneDNN's."""
    on_cpu = HAS_ONEDNN and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return on_cpu and x.dtype == weight.dtype == torch.float32


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    if weight.is_contiguous() and weight.shape[0] <= weight.shape[1] and x.numel() >= MANY_ROWS * x.shape[-1]:
        weight = weight.T.contiguous().T  # the order in memory in which narrow products are a quarter faster
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


class _Product(torch.autograd.Function):
    """`_product` with gradients; keeps the result of a ReLU instead of what went into it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
        out = _product(x, weight, bias, activation)
        ctx.save_for_backward(x, weight, out if activation == "relu" else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, positive = ctx.saved_tensors
        if positive is not None:
            grad = torch.ops.aten.threshold_backward(grad, positive, 0)
        rows = grad.flatten(0, -2)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            _product(grad, weight.T, None, "none") if needs_x else None,
            rows.T @ x.flatten(0, -2) if needs_weight else None,
            rows.sum(dim=0) if needs_bias else None,
            None,
        )
