"""Linear layers: our kernel for float32 on CPUs, torch's own products elsewhere.

What autograd records is no operator of ours but `Inputs` and `_Product`, so that recomputation can leave products out.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from groundingdino.ops.cpu_library import best_instruction_set, call, has_cpu_kernel, workspace_size
from groundingdino.runtime.kernels import Operator

Activation = Literal["none", "relu", "gelu"]
ACTIVATIONS = ("none", "relu", "gelu")  # in the kernel's order
MIN_MULTIPLY_ADDS = 1 << 23  # multiplications from which on the kernel is faster; fewer take no time at all
MANY_ROWS = 128  # from which on a large second factor may be rearranged for them


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "none") -> Tensor:
    """`F.linear` and the activation behind it.

    A float32 product on an x86 CPU is our kernel's. It adds the bias and applies the activation while a result is in
    the first cache (torch's own matmul copies the bias into the output first, and activates in another pass).
    Row blocks are scheduled dynamically, so one slow core does not stall the rest.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        activation: none, relu, or gelu (the exact one, by the error function); with gradients none or relu.

    Returns:
        (..., out).
    """
    if not uses_cpu_kernel(x, weight):
        return linear_reference(x, weight, bias, activation)
    if not needs_gradient(x, weight, bias):
        return product(x, weight, bias, activation)
    inputs = Inputs.apply(x, weight, bias)
    return _Product.apply(inputs[0].grad_fn, *inputs, activation)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "none") -> Tensor:
    """`linear` in plain torch, on every device."""
    return activate(F.linear(x, weight, bias), activation)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """By torch."""
    return F.relu(x) if activation == "relu" else F.gelu(x) if activation == "gelu" else x


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


def bmm(a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
    """start + a b, (B, R, C); a (B, R, K), b (B, K, C), start (C,), (B, R, 1) or None. By `linear` where it pays."""
    if len(a) == 1 and uses_cpu_kernel(a, b[0].mT) and (a.shape[1] >= MANY_ROWS or b.mT.is_contiguous()):
        weight = b[0].mT
        if start is None or start.dim() == 1:
            return linear(a, weight, start)
        return linear(a, weight, None).add_(start)
    return bmm_reference(a, b, start)


def bmm_reference(a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
    """`bmm` in plain torch, on every device."""
    return torch.bmm(a, b) if start is None else torch.baddbmm(start, a, b)


def uses_cpu_kernel(x: Tensor, weight: Tensor, operator: Operator = "linear") -> bool:
    """Whether a product is the CPU kernel's."""
    if x.device.type != "cpu" or x.dim() < 2 or not x.dtype == weight.dtype == torch.float32:
        return False
    # A compiler chooses products by itself.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or x.numel() * len(weight) < MIN_MULTIPLY_ADDS:
        return False
    # Without AVX2, torch's own products are tuned better.
    return has_cpu_kernel(operator, x) and best_instruction_set() >= 1


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "none") -> Tensor:
    """The kernel's product, without gradients: x (..., in), weight (out, in) -> (..., out), as `linear`."""
    return torch.ops.groundingdino.linear(x, weight, bias, activation)


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
    def forward(
        ctx: Any, inputs: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation
    ) -> Tensor:
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


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, instruction_set: int | None = None
) -> Tensor:
    """The kernel for float32 tensors on the CPU; x and the weight may have any strides. Needs `library()`.

    `instruction_set` is at most `best_instruction_set()`, which it is if None.
    """
    rows, (width_out, width_in) = x.shape[:-1].numel(), weight.shape
    out = x.new_empty(*x.shape[:-1], width_out)
    if rows <= min(width_in, width_out // 4) and weight.is_contiguous():
        # The kernel rearranges its second factor, so let that be the smaller one.
        transposed = weight.new_empty(width_out, rows)
        _multiply(weight, x.flatten(0, -2), weight.new_zeros(rows), "none", transposed, instruction_set)
        out.view(rows, width_out).copy_(transposed.T)
        return activate(out if bias is None else out.add_(bias), activation)
    bias = x.new_zeros(width_out) if bias is None else bias.contiguous()
    _multiply(x.flatten(0, -2), weight, bias, activation, out, instruction_set)
    return out


def _multiply(
    x: Tensor, weight: Tensor, bias: Tensor, activation: Activation, out: Tensor, instruction_set: int | None
) -> None:
    layout = (*weight.shape, *weight.stride())
    sizes = (len(x), *x.stride(), ACTIVATIONS.index(activation), torch.get_num_threads(), *layout)
    workspace = x.new_empty(workspace_size("linear", sizes))
    call("linear", sizes, instruction_set, (x, weight, bias, workspace, out))


torch.library.define("groundingdino::linear", "(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor")


@torch.library.impl("groundingdino::linear", "cpu")
def _forward_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    return forward(x, weight, bias, activation)


@torch.library.register_fake("groundingdino::linear")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))
