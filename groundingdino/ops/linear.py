"""Linear layers: oneDNN's products for float32 on CPUs, torch's own elsewhere."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# MKL comes with builds for x86 only; elsewhere oneDNN's float32 products have not been measured. What torch names with
# an underscore it may take away.
HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.mkl.is_available()
    and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
)
MANY_ROWS = 512  # from which on packing the weight pays
SOME_ROWS, LONG = 16, 1024  # or so many, if the weight's rows are so long (4 KiB) that they get into each other's way


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Literal["none", "relu"] = "none") -> Tensor:
    """`F.linear` and the activation behind it.

    A float32 product on an x86 CPU is oneDNN's: it adds the bias and applies the activation while a result is in the
    registers (torch's own product first copies the bias into the output, and the activation is another pass over it),
    and with AVX-512 its products are faster, too.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        activation: none or relu.

    Returns:
        (..., out).
    """
    if not by_onednn(x, weight):
        out = F.linear(x, weight, bias)
        return out if activation == "none" else F.relu(out)
    if not needs_gradient(x, weight, bias):
        return product(x, weight, bias, activation)
    inputs = Inputs.apply(x, weight, bias)
    return _Product.apply(inputs[0].grad_fn, *inputs, activation)


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor, activation: Literal["none", "relu"] = "none") -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias, activation)


def dots(a: Tensor, b: Tensor, offset: Tensor) -> Tensor:
    """a (B, R, D) and b (B, C, D) -> (B, R, C) their dot products and offset (B, R, 1); by `linear` where it pays."""
    if len(a) == 1 and by_onednn(a, b):
        return linear(a[0], b[0], None)[None].add_(offset)
    return torch.baddbmm(offset, a, b.mT)


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is oneDNN's."""
    on_cpu = HAS_ONEDNN and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    # A compiler chooses products by itself.
    return on_cpu and x.dtype == weight.dtype == torch.float32 and not torch.compiler.is_compiling()


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """oneDNN's product, without gradients: x (..., in), weight (out, in) or `packed` -> (..., out).

    The activation is none, relu or gelu (the exact one, by the error function).
    """
    return torch.ops.mkldnn._linear_pointwise(x, packed(weight, x.shape[:-1].numel()), bias, activation, [], "none")


def packed(weight: Tensor, rows: int) -> Tensor:
    """weight (out, in) in the order in memory that oneDNN likes best, where that pays for a product with so many rows.

    What is packed already, or transposed, comes back as it is.
    """
    pays = rows >= MANY_ROWS or (rows >= SOME_ROWS and weight.shape[1] >= LONG)
    if not pays or weight.is_mkldnn or not weight.is_contiguous():
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


class Inputs(torch.autograd.Function):
    """Tensors as they are; keeps them for the backward pass of what is computed from them.

    An autograd function keeps its tensors when its forward pass is done. Where activations are computed again in the
    backward pass, torch stops as soon as everything that was kept is there. With its inputs kept by a function before
    it, a product at the end of such a block is not computed a second time.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Views of all."""
        ctx.save_for_backward(*tensors)
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients as they come."""
        return grads


class _Product(torch.autograd.Function):
    """`product` with gradients; keeps the result of a ReLU instead of what went into it."""

    @staticmethod
    def forward(ctx: Any, inputs: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        out = product(x, weight, bias, activation)
        ctx.inputs, ctx.activation = inputs, activation
        if activation == "relu":
            ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.inputs.saved_tensors
        if ctx.activation == "relu":
            grad = torch.ops.aten.threshold_backward(grad, *ctx.saved_tensors, 0)
        rows = grad.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.inputs.needs_input_grad
        return (
            None,
            product(grad, weight.T, None) if needs_x else None,
            rows.T @ x.flatten(0, -2) if needs_weight else None,
            rows.sum(dim=0) if needs_bias else None,
            None,
        )
