"""Operators with a kernel of their own; each has a reference with the same signature (`linear` has `F.linear`)."""

from groundingdino.ops.feed_forward import feed_forward, feed_forward_reference
from groundingdino.ops.linear import Activation, Linear, bmm, bmm_reference, linear
from groundingdino.ops.ms_deform_attn import cpu as cpu  # registers the CPU's kernels
from groundingdino.ops.ms_deform_attn import npu as npu  # registers the NPU's kernels; needs neither torch_npu nor CANN
from groundingdino.ops.ms_deform_attn import triton as triton  # registers the GPU's kernels; imports triton when used
from groundingdino.ops.ms_deform_attn.op import ms_deform_attn
from groundingdino.ops.ms_deform_attn.reference import ms_deform_attn_reference
from groundingdino.ops.window_attention import window_attention, window_attention_reference
from groundingdino.ops.windows import Windows, map_windows

__all__ = [
    "Activation",
    "Linear",
    "bmm",
    "bmm_reference",
    "feed_forward",
    "feed_forward_reference",
    "linear",
    "Windows",
    "map_windows",
    "ms_deform_attn",
    "ms_deform_attn_reference",
    "window_attention",
    "window_attention_reference",
]
