"""What a block of code does to the device, seen at the dispatcher: reads by the host, and float64 on the device."""

import traceback
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")


def _on_npu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "npu"


class Watch(TorchDispatchMode):
    """`reads`: "file:line operator" of each host read. Raises where a float64 or complex tensor appears on the NPU."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        inputs, outputs = tree_leaves((args, kwargs)), tree_leaves(result)
        wide = [t for t in outputs if _on_npu(t) and (t.dtype == torch.float64 or t.is_complex())]
        if wide:
            raise AssertionError(f"{name} puts {wide[0].dtype} on the NPU at {_place()}")
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        to_host = name in ("_to_copy", "copy_") and any(map(_on_npu, inputs[1:] if name == "copy_" else inputs))
        to_host = to_host and not any(map(_on_npu, outputs))
        by_value = name in READS and any(map(_on_npu, inputs))
        if to_host or by_value or any(_on_npu(i) and i.dtype == torch.bool for i in indices):
            self.reads[f"{_place()} {name}"] += 1
        return result


def _place() -> str:
    """The line of the library that caused it."""
    for frame in reversed(traceback.extract_stack()):
        if "/groundingdino/" in frame.filename:
            return f"{frame.filename.split('/groundingdino/')[1]}:{frame.lineno}"
    return "torch's backward pass"
