"""Attention inside the windows of a map: the CPU's kernel, its autograd, and the same in plain torch.

Axes: B images, S tokens of the map, W windows, N places in a window, M heads, C channels of a head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from groundingdino.ops.cpu_library import call, has_cpu_kernel, workspace_size
from groundingdino.ops.windows import Windows
from groundingdino.runtime import tuning
from groundingdino.runtime.kernels import kernel_mode

INPUTS = "Tensor qkv, Tensor padding, Tensor bias, Tensor token, Tensor place, Tensor? mask"
SCHEMA = f"({INPUTS}) -> Tensor"
BACKWARD_SCHEMA = f"(Tensor grad, {INPUTS}) -> (Tensor, Tensor, Tensor)"
SCORES = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}  # by type of qkv
CHUNKS = 8  # of windows, for sums over windows; a constant, so that results do not depend on the number of threads


def window_attention(qkv: Tensor, padding: Tensor, bias: Tensor, windows: Windows) -> Tensor:
    """Self-attention of each window (Liu et al. 2021, Swin Transformer, equation 4).

    Args:
        qkv: (B, S, 3, M, C) queries, keys and values of the tokens.
        padding: (3, M, C) those of every padded place.
        bias: (M, N, N) what is added to the scores, for the relative positions.
        windows: of the map.

    Returns:
        (B, S, M, C).

    On the CPU an operator with a kernel: float32, float64, or bfloat16 with scores, sums and bias in float32.
    Elsewhere, and in float16, the formulation that `groundingdino selfcheck --tune` found to be the fastest on this
    card, or plain torch.
    `GROUNDINGDINO_KERNELS=window_attention=off` asks for plain torch everywhere.
    """
    if qkv.device.type == "cpu" and qkv.dtype in SCORES:
        tensors = (qkv, padding, bias.to(SCORES[qkv.dtype]), windows.token, windows.place, windows.mask)
        return torch.ops.groundingdino.window_attention(*tensors)
    measured = tuning.choice(qkv.device, operation(bias))
    if measured in FORMULATIONS and kernel_mode("window_attention") == "auto":
        return window_attention_as(measured, qkv, padding, bias, windows)
    return window_attention_reference(qkv, padding, bias, windows)


def window_attention_reference(qkv: Tensor, padding: Tensor, bias: Tensor, windows: Windows) -> Tensor:
    """`window_attention` in plain torch, on every device."""
    # No fused kernel of torch's has a gradient for the bias; two batched products then cost less than its own fallback.
    return window_attention_as("composed" if bias.requires_grad else "sdpa", qkv, padding, bias, windows)


def window_attention_as(formulation: str, qkv: Tensor, padding: Tensor, bias: Tensor, windows: Windows) -> Tensor:
    """`window_attention` by one of FORMULATIONS."""
    parts = _partition(qkv, padding, windows)
    bias = bias.to(qkv.dtype)
    if windows.mask is not None:
        bias = bias + windows.mask[:, None].to(qkv.dtype)  # (W, M, N, N)
    out = FORMULATIONS[formulation](parts, bias)
    return out.transpose(1, 2).reshape(len(qkv), -1, *qkv.shape[3:]).index_select(1, windows.place)


def operation(bias: Tensor) -> str:
    """The name under which a call is measured and chosen: by window size, and whether the bias is trained."""
    return f"window_attention {'training' if bias.requires_grad else 'inference'}, {bias.shape[-1]} places"


# Each takes queries, keys and values (3, B * W, M, N, C) and the bias of the scores, (M, N, N) or (W, M, N, N), and
# returns (B * W, M, N, C).


def _composed(parts: Tensor, bias: Tensor) -> Tensor:
    q, k, v = parts.contiguous().flatten(1, 2).unbind()  # (B * W * M, N, C)
    scores = torch.bmm(q, k.mT).view(-1, *bias.shape)
    scores = torch.add(bias, scores, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(dim=-1).view(-1, *bias.shape[-2:]), v).view(parts.shape[1:])


def _sdpa(parts: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=_for_each_window(parts, bias))


def _npu_fusion_attention(parts: Tensor, bias: Tensor) -> Tensor:
    """torch_npu's fused attention. `pse` is what it adds to the scaled scores; "BNSD" is our (B * W, M, N, C)."""
    q, k, v = parts.contiguous().unbind()
    pse = _for_each_window(parts, bias).contiguous()
    return torch.ops.npu.npu_fusion_attention(q, k, v, q.shape[1], "BNSD", pse=pse, scale=q.shape[-1] ** -0.5)[0]


def _for_each_window(parts: Tensor, bias: Tensor) -> Tensor:
    """(1 or B * W, M, N, N)."""
    return bias[None] if bias.dim() == 3 else bias.repeat(parts.shape[1] // bias.shape[0], 1, 1, 1)


FORMULATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "composed": _composed,
    "sdpa": _sdpa,
    "npu_fusion_attention": _npu_fusion_attention,
}


def window_attention_backward_reference(
    grad: Tensor, qkv: Tensor, padding: Tensor, bias: Tensor, windows: Windows
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, padding and bias in plain torch."""
    batch, tokens, _, heads, channels = qkv.shape
    q, k, v = _partition(qkv, padding, windows)
    grad_out = _partition(grad[:, :, None], grad.new_zeros(1, heads, channels), windows)[0]
    scores = (q @ k.mT * channels**-0.5).unflatten(0, (batch, -1)) + bias
    if windows.mask is not None:
        scores = scores + windows.mask[:, None]
    attention = scores.softmax(dim=-1).flatten(0, 1)  # (B * W, M, N, N)
    grad_attention = grad_out @ v.mT
    grad_scores = attention * (grad_attention - (attention * grad_attention).sum(dim=-1, keepdim=True))
    grad_q, grad_k = grad_scores @ k * channels**-0.5, grad_scores.mT @ q * channels**-0.5
    rows = torch.stack((grad_q, grad_k, attention.mT @ grad_out)).permute(1, 3, 0, 2, 4)  # (B * W, N, 3, M, C)
    rows = rows.reshape(batch, -1, 3, heads, channels)
    summed = qkv.new_zeros(batch, tokens + 1, 3, heads, channels).index_add_(1, windows.token.flatten(), rows)
    return summed[:, :tokens].contiguous(), summed[:, tokens].sum(dim=0), grad_scores.sum(dim=0)


def _partition(tokens: Tensor, padding: Tensor, windows: Windows) -> Tensor:
    """(B, S, P, M, C) and what stands for every padded place, (P, M, C) -> (P, B * W, M, N, C)."""
    rows = torch.cat((tokens, padding.expand(len(tokens), 1, -1, -1, -1)), dim=1)
    gathered = rows.index_select(1, windows.token.flatten())
    return gathered.view(-1, windows.token.shape[1], *rows.shape[2:]).permute(2, 0, 3, 1, 4)


def forward(qkv: Tensor, padding: Tensor, bias: Tensor, windows: Windows, instruction_set: int | None = None) -> Tensor:
    """The kernel on the CPU: all of one type of SCORES' keys, but the bias of its values. Needs `library()`."""
    out = torch.empty_like(qkv[:, :, 0], memory_format=torch.contiguous_format)
    sizes = _sizes(qkv, windows.token)
    workspace = bias.new_zeros(workspace_size("window_forward", sizes))
    call("window_forward", sizes, instruction_set, (*_inputs(qkv, padding, bias, windows), workspace, out))
    return out


def backward(
    grad: Tensor, qkv: Tensor, padding: Tensor, bias: Tensor, windows: Windows, instruction_set: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, padding and bias; as `forward`, all tensors float32 or float64."""
    sizes = _sizes(qkv, windows.token)
    workspace = qkv.new_zeros(workspace_size("window_backward", sizes))
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_padding, grad_bias = padding.new_zeros(CHUNKS, *padding.shape), bias.new_zeros(CHUNKS, *bias.shape)
    inputs = (grad.contiguous(), *_inputs(qkv, padding, bias, windows))
    call("window_backward", sizes, instruction_set, (*inputs, workspace, grad_qkv, grad_padding, grad_bias))
    return grad_qkv, grad_padding.sum(dim=0), grad_bias.sum(dim=0)


def _sizes(qkv: Tensor, token: Tensor) -> tuple[int, ...]:
    batch, tokens, _, heads, channels = qkv.shape
    return (batch, tokens, heads, channels, *token.shape, CHUNKS, torch.get_num_threads())


def _inputs(qkv: Tensor, padding: Tensor, bias: Tensor, windows: Windows) -> tuple[Tensor | None, ...]:
    mask = None if windows.mask is None else windows.mask.to(bias.dtype)
    tensors = (qkv, padding, windows.token, bias, mask)
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


torch.library.define("groundingdino::window_attention", SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
torch.library.define("groundingdino::window_attention_backward", BACKWARD_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl("groundingdino::window_attention", "cpu")
def _forward_cpu(
    qkv: Tensor, padding: Tensor, bias: Tensor, token: Tensor, place: Tensor, mask: Tensor | None
) -> Tensor:
    compute = forward if has_cpu_kernel("window_attention", qkv.dtype) else window_attention_reference
    return compute(qkv, padding, bias, Windows(token, place, mask)).contiguous()


@torch.library.impl("groundingdino::window_attention_backward", "cpu")
def _backward_cpu(
    grad: Tensor, qkv: Tensor, padding: Tensor, bias: Tensor, token: Tensor, place: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    compute = backward if has_cpu_kernel("window_attention", qkv.dtype) else window_attention_backward_reference
    exact = bias.dtype
    grads = compute(grad.to(exact), qkv.to(exact), padding.to(exact), bias, Windows(token, place, mask))
    return grads[0].to(qkv.dtype), grads[1].to(qkv.dtype), grads[2]


@torch.library.register_fake("groundingdino::window_attention")
def _fake(qkv: Tensor, padding: Tensor, bias: Tensor, token: Tensor, place: Tensor, mask: Tensor | None) -> Tensor:
    batch, tokens, _, heads, channels = qkv.shape
    return qkv.new_empty(batch, tokens, heads, channels)


@torch.library.register_fake("groundingdino::window_attention_backward")
def _fake_backward(
    grad: Tensor, qkv: Tensor, padding: Tensor, bias: Tensor, token: Tensor, place: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), padding.new_empty(padding.shape), bias.new_empty(bias.shape)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.groundingdino.window_attention_backward(grad, *ctx.saved_tensors)
    return *grads, None, None, None


torch.library.register_autograd("groundingdino::window_attention", _backward, setup_context=_setup_context)
