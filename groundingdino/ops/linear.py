"""Linear layers: our kernel for float32 on CPUs, oneDNN's for bfloat16 there, torch's own matmul elsewhere.

Autograd records no operator of ours but `Inputs` and `_Linear`, so that recomputation can leave a matmul out.
"""

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from groundingdino.ops.cpu_library import best_instruction_set, call, has_cpu_kernel, workspace_size
from groundingdino.runtime.kernels import Operator

Activation = Literal["none", "relu", "gelu"]
ACTIVATIONS = ("none", "relu", "gelu")  # in the kernel's order
MIN_MULTIPLY_ADDS = 1 << 23  # multiply-adds from which on the kernel is faster; fewer take no time at all
MANY_ROWS = 128  # from which on a large second factor may be rearranged for them


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, which is also its reference.

    A bfloat16 matmul that needs no gradient is oneDNN's, as torch brings it, where the CPU has instructions for it. A
    float32 matmul on an x86 CPU is our kernel's. It adds the bias while a result is in the first cache (torch's own
    matmul copies the bias into the output first).
    Row blocks are scheduled dynamically, so one slow core does not stall the rest.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.

    Returns:
        (..., out).
    """
    if not uses_cpu_kernel(x, weight):
        return F.linear(x, weight, bias)
    if not needs_gradient(x, weight, bias):
        return matmul(x, weight, bias)
    inputs = Inputs.apply(x, weight, bias)
    return _Linear.apply(inputs[0].grad_fn, *inputs)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation in plain torch; "gelu" is the exact one, by the error function."""
    return F.relu(x) if activation == "relu" else F.gelu(x) if activation == "gelu" else x


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

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
    """Whether the CPU kernel computes x times the weight; in bfloat16 without gradients only."""
    if x.device.type != "cpu" or x.dim() < 2 or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    # An exported graph is for other programs. A compiled one is for any size, and our kernels do not mind.
    if torch.compiler.is_compiling():
        if not torch.compiler.is_dynamo_compiling() or needs_gradient(x, weight):
            return False
    elif x.numel() * len(weight) < MIN_MULTIPLY_ADDS:
        return False
    if x.dtype == torch.bfloat16 and (not weight.is_contiguous() or needs_gradient(x, weight)):
        return False
    return _has_kernel(x.dtype, operator)


@torch.compiler.assume_constant_result
def _has_kernel(dtype: torch.dtype, operator: Operator) -> bool:
    if dtype == torch.bfloat16:
        return has_cpu_kernel(operator, dtype) and _has_onednn()
    # Without AVX2, torch's own matmul is tuned better.
    return dtype == torch.float32 and has_cpu_kernel(operator, dtype) and best_instruction_set() >= 1


@functools.cache
def _has_onednn() -> bool:
    """Whether torch brings oneDNN's bfloat16 products, and this processor has instructions for them."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "none") -> Tensor:
    """The kernel's linear layer and activation, without gradients: x (..., in), weight (out, in) -> (..., out).

    The activation is applied while a result is in the first cache. "gelu" is the exact one.
    """
    return torch.ops.groundingdino.linear(x, weight, bias, activation)


class Inputs(torch.autograd.Function):
    """Returns its tensors as they are, and keeps them for the backward pass of what is computed from them.

    An autograd function keeps its tensors when its forward pass is done. Where activations are computed again in the
    backward pass, torch stops as soon as everything that was kept is there. With its inputs kept by a function before
    it, a matmul at the end of such a block is not computed a second time.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Views of all tensors."""
        ctx.save_for_backward(*tensors)
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients as they come."""
        return grads


class _Linear(torch.autograd.Function):
    """`matmul` with gradients."""

    @staticmethod
    def forward(ctx: Any, inputs: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.inputs = inputs
        return matmul(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.inputs.saved_tensors
        rows = grad.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.inputs.needs_input_grad
        return (
            None,
            matmul(grad, weight.T, None) if needs_x else None,
            rows.T @ x.flatten(0, -2) if needs_weight else None,
            rows.sum(dim=0) if needs_bias else None,
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


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """`matmul` in bfloat16; the weight contiguous.

    `F.linear` multiplies by the weight as it lies. To rearrange it first takes 0.2 to 0.9 ms,
    and the product then 0.7 to 1.1 times as long as before, the activation included, which is free.
    """
    arranged = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[:-1].numel())
    return torch.ops.mkldnn._linear_pointwise(x, arranged, bias, activation, [], "none")


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
    return (onednn if x.dtype == torch.bfloat16 else forward)(x, weight, bias, activation)


@torch.library.register_fake("groundingdino::linear")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
