"""The CPU's kernel of multi-scale deformable attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

from groundingdino.ops.cpu_library import call, has_cpu_kernel, workspace_size
from groundingdino.ops.ms_deform_attn.op import check_arguments, pairs
from groundingdino.ops.ms_deform_attn.reference import ms_deform_attn_backward_reference, ms_deform_attn_reference


def forward(
    value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor, instruction_set: int | None = None
) -> Tensor:
    """The kernel on the CPU; arguments as the operator's. Needs `library()`.

    All tensors float32 or float64; or the value, and with it the output, bfloat16 and the others float32.
    `instruction_set` is at most `best_instruction_set()`, which it is if None.
    """
    check_arguments(value, shapes, locations, weights)
    batch, _, heads, channels = value.shape
    out = value.new_empty(batch, locations.shape[1], heads * channels)
    if out.numel() == 0:
        return out
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    sizes = _sizes(value, shapes, locations)
    workspace = locations.new_empty(workspace_size("msda_forward", sizes))
    call("msda_forward", sizes, instruction_set, (value, locations, weights, workspace, out))
    return out


def backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    instruction_set: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights; as `forward`, all tensors float32 or float64."""
    check_arguments(value, shapes, locations, weights)
    if grad_output.numel() == 0:
        return torch.zeros_like(value), torch.zeros_like(locations), torch.zeros_like(weights)
    inputs = [tensor.contiguous() for tensor in (grad_output, value, locations, weights)]
    grads = torch.empty_like(inputs[1]), torch.empty_like(inputs[2]), torch.empty_like(inputs[3])
    sizes = _sizes(value, shapes, locations)
    workspace = value.new_empty(workspace_size("msda_backward", sizes))
    call("msda_backward", sizes, instruction_set, (*inputs, workspace, *grads))
    return grads


def _sizes(value: Tensor, shapes: Sequence[int], locations: Tensor) -> tuple[int, ...]:
    batch, tokens, heads, channels = value.shape
    _, queries, _, levels, points, _ = locations.shape
    return (batch, tokens, heads, channels, queries, levels, points, torch.get_num_threads(), *shapes)


@torch.library.impl("groundingdino::ms_deform_attn", "cpu")
def _forward_cpu(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    if has_cpu_kernel("ms_deform_attn", value.dtype):
        return forward(value, shapes, locations, weights)
    exact = value.to(locations.dtype)
    return ms_deform_attn_reference(exact, pairs(shapes), locations, weights).to(value.dtype)


@torch.library.impl("groundingdino::ms_deform_attn_backward", "cpu")
def _backward_cpu(
    grad_output: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, exact = grad_output.to(locations.dtype), value.to(locations.dtype)
    if has_cpu_kernel("ms_deform_attn", value.dtype):
        grads = backward(grad, exact, shapes, locations, weights)
    else:
        grads = ms_deform_attn_backward_reference(grad, exact, pairs(shapes), locations, weights)
    return grads[0].to(value.dtype), grads[1], grads[2]
