"""Whether operators use their kernels: the environment variable GROUNDINGDINO_KERNELS.

    auto      (default) the device's kernel where there is one for the call, else the reference in plain torch
    require   as auto, but an error where the device's kernel is not built, not loadable or cannot compute the call
    off       the references, on every device

One word is for all operators; `operator=word` overrides it for one, so `off,linear=auto` uses the kernel of `linear`
only. Deformable attention has kernels for several devices and is required on any; the other operators have kernels of
ours on the CPU only, where they are required: on an accelerator torch's own operators compute them.

The older GROUNDINGDINO_MSDA still works where GROUNDINGDINO_KERNELS is not set: `auto`, `aclnn` (which is
`ms_deform_attn=require`) and `composite` (`off`).
"""

import os
import warnings
from functools import cache
from typing import Literal, get_args

Operator = Literal["ms_deform_attn", "window_attention", "linear", "feed_forward"]
Mode = Literal["auto", "require", "off"]
VARIABLE, OLD_VARIABLE = "GROUNDINGDINO_KERNELS", "GROUNDINGDINO_MSDA"
OLD_VALUES = {"auto": "auto", "aclnn": "ms_deform_attn=require", "composite": "off"}


def kernel_mode(operator: Operator) -> Mode:
    """What the environment asks for an operator: auto, require or off. Read at every call.

    Raises:
        ValueError: a word or an operator that does not exist.
    """
    value, old = os.environ.get(VARIABLE), os.environ.get(OLD_VARIABLE)
    if value is None and old is not None:
        value = _from_old(old)
    return _parse(value or "auto")[operator]


@cache
def _parse(value: str) -> dict[Operator, Mode]:
    everywhere: Mode = "auto"
    single: dict[str, Mode] = {}
    modes: dict[str, Mode] = {mode: mode for mode in get_args(Mode)}
    for item in value.split(","):
        operator, _, word = item.strip().rpartition("=")
        if word not in modes or operator not in ("", *get_args(Operator)):
            raise ValueError(
                f"{VARIABLE}={value!r}: set it to {', '.join(get_args(Mode))}, or to one for an operator, such as "
                f"off,linear=auto; operators are {', '.join(get_args(Operator))}"
            )
        if operator:
            single[operator] = modes[word]
        else:
            everywhere = modes[word]
    return {operator: single.get(operator, everywhere) for operator in get_args(Operator)}


@cache
def _from_old(value: str) -> str:
    if value not in OLD_VALUES:
        raise ValueError(f"{OLD_VARIABLE}={value!r}: unset it, and set {VARIABLE} to {', '.join(get_args(Mode))}")
    warnings.warn(f"{OLD_VARIABLE}={value} is now {VARIABLE}={OLD_VALUES[value]}", FutureWarning, stacklevel=3)
    return OLD_VALUES[value]
