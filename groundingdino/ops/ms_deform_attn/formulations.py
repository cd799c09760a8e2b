"""The formulations of multi-scale deformable attention that every device can run, and how a measured one is chosen.

Each takes the arguments of the operator's references. A device's file adds its kernel under the kernel's name.
"""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from groundingdino.ops.ms_deform_attn.gather import (
    add_rows,
    ms_deform_attn_backward_gather,
    ms_deform_attn_gather,
    sort_and_sum_rows,
)
from groundingdino.ops.ms_deform_attn.reference import ms_deform_attn_backward_reference, ms_deform_attn_reference

Forward = Callable[..., Tensor]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]

FORWARD: Mapping[str, Forward] = {"grid_sample": ms_deform_attn_reference, "gather": ms_deform_attn_gather}
BACKWARD: Mapping[str, Backward] = {
    "grid_sample": ms_deform_attn_backward_reference,
    "gather, index_add": partial(ms_deform_attn_backward_gather, sum_rows=add_rows),
    "gather, sorted": partial(ms_deform_attn_backward_gather, sum_rows=sort_and_sum_rows),
}


def operation(direction: str, value: Tensor, locations: Tensor) -> str:
    """The name under which a call is measured and chosen; `direction` is forward or backward.

    Calls of the encoder, where every token is a query, and of the decoder are measured apart.
    """
    site = "encoder" if locations.shape[1] == value.shape[1] else "decoder"
    return f"ms_deform_attn {direction}, {site}"
