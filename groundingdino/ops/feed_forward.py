"""The feed-forward block of a transformer layer: two linear layers with an activation between them.

Axes: R rows, D width, H hidden width.
"""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from groundingdino.ops.cpu_library import call, workspace_size
from groundingdino.ops.linear import (
    ACTIVATIONS,
    Activation,
    Inputs,
    Linear,
    activate,
    matmul,
    needs_gradient,
    onednn,
    uses_cpu_kernel,
)
from groundingdino.ops.linear import forward as linear_forward

AT_ONCE = 1 << 22  # numbers of the hidden layer: 16 MiB, so that they wait in the processor's cache for the next step


def feed_forward(x: Tensor, fc1: nn.Module, fc2: nn.Module, activation: Activation) -> Tensor:
    """`fc2(activation(fc1(x)))`, (..., D) -> (..., D); "gelu" is the exact one.

    In float32 on an x86 CPU the hidden layer never exists as a whole. Forward and backward go over some rows at a time,
    and the backward pass computes the hidden layer again: one matmul in six more, and less time all the same, because
    at (image tokens, 2048) keeping it costs more than computing it. So the layers are called one by one only where
    somebody observes or replaces one of them (`is_plain`).
    """
    if not (is_plain(fc1) and is_plain(fc2) and uses_cpu_kernel(x, fc1.weight, "feed_forward")):
        return feed_forward_reference(x, fc1, fc2, activation)
    tensors = (x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    if not needs_gradient(*tensors):
        return torch.ops.groundingdino.feed_forward(*tensors, activation)
    inputs = Inputs.apply(*tensors)
    return _FeedForward.apply(inputs[0].grad_fn, *inputs, activation)


def feed_forward_reference(x: Tensor, fc1: nn.Module, fc2: nn.Module, activation: Activation) -> Tensor:
    """`feed_forward` in plain torch, on every device."""
    return fc2(activate(fc1(x), activation))


def is_plain(layer: nn.Module) -> TypeGuard[Linear]:
    """Whether to call the layer is to multiply by its weight and to add its bias, and nobody would notice the call.

    Not so for an adapter, a quantised or a parametrized layer (each is of another type), or with a hook on it.
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    replaced = type(layer) is not Linear or "forward" in vars(layer) or layer.bias is None
    return not replaced and not any(hooks) and not _has_any_global_hook()


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
        activation: Activation,
    ) -> Tensor:  # fmt: skip
        ctx.inputs, ctx.activation = inputs, activation
        return torch.ops.groundingdino.feed_forward(x, weight1, bias1, weight2, bias2, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, bias1, weight2, _ = ctx.inputs.saved_tensors
        rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
        pieces = max(1, round(len(rows) * len(weight1) / AT_ONCE))
        count = max(1, -(-len(rows) // pieces))
        grad_x = torch.empty_like(rows)
        grad_weight1, grad_bias1, grad_weight2 = (torch.zeros_like(tensor) for tensor in (weight1, bias1, weight2))
        for part, grad_part, result in zip(*(tensor.split(count) for tensor in (rows, grad_rows, grad_x)), strict=True):
            grad_hidden = matmul(grad_part, weight2.T, None)
            if ctx.activation == "relu":
                hidden = matmul(part, weight1, bias1, "relu")
                grad_hidden = torch.ops.aten.threshold_backward(grad_hidden, hidden, 0)
            else:
                before = matmul(part, weight1, bias1)
                hidden = F.gelu(before)
                grad_hidden = torch.ops.aten.gelu_backward(grad_hidden, before)
            grad_weight2.addmm_(grad_part.T, hidden)
            grad_weight1.addmm_(grad_hidden.T, part)
            grad_bias1 += grad_hidden.sum(dim=0)
            result.copy_(matmul(grad_hidden, weight1.T, None))
        return None, grad_x.view(x.shape), grad_weight1, grad_bias1, grad_weight2, grad_rows.sum(dim=0), None


def forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    activation: Activation,
    instruction_set: int | None = None,
) -> Tensor:
    """The kernels for float32 tensors on the CPU. Need `library()`.

    `instruction_set` is at most `best_instruction_set()`, which it is if None.
    """
    rows = x.shape[:-1].numel()
    if 8 * rows <= len(weight1):  # few, whose hidden layer is small, beside the weights
        hidden = linear_forward(x, weight1, bias1, activation, instruction_set)
        return linear_forward(hidden, weight2, bias2, "none", instruction_set)
    x, bias1, bias2 = x.contiguous(), bias1.contiguous(), bias2.contiguous()
    out = torch.empty_like(x)
    weights = (*weight1.shape, *weight1.stride(), *weight2.shape, *weight2.stride())
    sizes = (rows, ACTIVATIONS.index(activation), torch.get_num_threads(), *weights)
    workspace = x.new_empty(workspace_size("feed_forward", sizes))
    call("feed_forward", sizes, instruction_set, (x, weight1, bias1, weight2, bias2, workspace, out))
    return out


torch.library.define(
    "groundingdino::feed_forward",
    "(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, str activation) -> Tensor",
)


@torch.library.impl("groundingdino::feed_forward", "cpu")
def _forward_cpu(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, activation: Activation
) -> Tensor:
    if x.dtype == torch.bfloat16:
        return onednn(onednn(x, weight1, bias1, activation), weight2, bias2, "none")
    return forward(x, weight1, bias1, weight2, bias2, activation)


@torch.library.register_fake("groundingdino::feed_forward")
def _fake(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, activation: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
