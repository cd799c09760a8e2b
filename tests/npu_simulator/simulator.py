"""A whole NPU without one: torch_npu's wheel over the fake CANN, its aten operators computed by PyTorch's CPU kernels.

`install()` once, before anything imports torch. See README.md beside this file for what it can and cannot show.
"""

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent

# torch_npu's own: allocation, views, copies between devices, reading a value, and the fused AdamW.
KEPT_PREFIXES = ("empty", "unsafe_empty", "new_empty", "resize_", "set_", "as_strided", "npu_", "_npu_", "view", "one_")
KEPT = frozenset(
    "_reshape_alias unfold copy_ _to_copy _local_scalar_dense is_set_to _pin_memory is_pinned squeeze unsqueeze "
    "get_npu_format record_stream _copy_from _copy_from_and_resize _fused_adamw_".split()
)


def install() -> None:
    """Load the fake CANN and torch_npu, then give the operators their kernels."""
    sys.path.insert(0, str(HERE.parent))
    from fake_cann import build, load

    load.load()
    import torch

    torch.ops.load_library(build.simulator())
    registered, has = (
        torch._C._dispatch_get_registrations_for_dispatch_key,
        torch._C._dispatch_has_kernel_for_dispatch_key,
    )

    def of_aten(key: str) -> list[str]:
        return [name.removeprefix("aten::") for name in registered(key) if name.startswith("aten::")]

    kernels: dict[str, list[str]] = {"on_cpu": [], "composed": [], "stock_autograd": []}
    for name in {*of_aten("PrivateUse1"), *of_aten("AutogradPrivateUse1")}:
        base = name.split(".")[0]
        if has(f"aten::{name}", "CompositeImplicitAutograd"):
            kernels["composed"].append(name)
            continue
        if has(f"aten::{name}", "AutogradPrivateUse1"):
            kernels["stock_autograd"].append(name)
        kept = base in KEPT or base.startswith(KEPT_PREFIXES)
        computable = any(has(f"aten::{name}", key) for key in ("CPU", "CompositeExplicitAutograd"))
        if not kept and computable:
            kernels["on_cpu"].append(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that kernels are replaced
        for kernel, names in kernels.items():
            torch.ops.npu_simulator.register_kernel(names, kernel)
    # An operator that a card does not have would be computed on the host behind our back.
    warnings.filterwarnings("error", message=".*not currently supported on the NPU backend.*")


def pytest_configure() -> None:
    """As a pytest plugin: `-p npu_simulator.simulator`."""
    install()


def collectives() -> int:
    """Calls of HCCL's collectives so far."""
    from fake_cann import load

    return load.LIBRARIES["libhccl.so"].fake_hccl_collectives()


def counters() -> dict[str, int]:
    """The fake runtime's counters, operators computed (`kernels`), and those whose result's size depends on values."""
    import torch
    from fake_cann import load

    kernels, data_dependent = torch.ops.npu_simulator.counters()
    return {**load.counters(), "kernels": kernels, "data_dependent": data_dependent}
