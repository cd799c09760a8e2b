"""What was measured on this machine's card: which formulation of each operator is the fastest correct one there.

`groundingdino selfcheck --tune` measures and writes the table into the user's cache; operators ask `choice`. A table of
another card or of other versions does not count, and without one every operator has its documented default.
"""

import functools
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import torch
from torch import Tensor

import groundingdino
from groundingdino.runtime import devices
from groundingdino.runtime.cache import cache_folder
from groundingdino.runtime.files import atomic_file

# Largest error relative to a result's largest entry. Kernels sum in their own order and divide approximately.
TOLERANCE = 1e-3

logger = logging.getLogger(__name__)
Clock = Callable[[str, Callable[[], object]], float]


@dataclass(frozen=True)
class Measured:
    """One operation's formulations: milliseconds of the correct ones by case, and why the others were refused."""

    milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)  # case -> formulation -> time
    refused: dict[str, str] = field(default_factory=dict)

    def fastest(self) -> str | None:
        """The formulation that takes the least time over all cases; None where none was correct in all."""
        totals: dict[str, float] = {}
        for times in self.milliseconds.values():
            for name in times.keys() - self.refused.keys():
                totals[name] = totals.get(name, 0.0) + times[name]
        return min(totals, key=lambda name: (totals[name], name)) if totals else None


@dataclass(frozen=True)
class Table:
    """What one `--tune` has found. `machine` says for which card and versions it counts."""

    machine: dict[str, str]
    operations: dict[str, Measured]


@dataclass(frozen=True)
class Case:
    """One set of arguments: the right result, and each formulation as a call that gives its own."""

    name: str
    expected: Callable[[], Sequence[Tensor]]
    calls: Mapping[str, Callable[[], Sequence[Tensor]]]
    timed: bool = True  # False: only to be right


def machine(device: torch.device) -> dict[str, str]:
    """Card and versions: a measurement counts where all of them are the same."""
    found = {"device": device.type, "groundingdino": groundingdino.__version__, "torch": str(torch.__version__)}
    if device.type == "cpu":
        return found
    module = torch.get_device_module(device)
    found["card"] = module.get_device_name(device)
    if device.type == "npu":
        get_version = getattr(module.utils, "get_cann_version", None)
        found["CANN"] = str((get_version and get_version()) or "unknown")
    for package in {"npu": ("torch_npu",), "cuda": ("triton",)}.get(device.type, ()):
        found[package] = installed_version(package)
    return found


def installed_version(package: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def measure(cases: Iterable[Case], clock: Clock) -> Measured:
    """Run every formulation in every case: first whether it is right, then how long it takes.

    A formulation that is wrong or fails in one case is refused, and not run in the cases after it.
    """
    found = Measured()
    for case in cases:
        expected = case.expected()
        times: dict[str, float] = {}
        for name, call in case.calls.items():
            if name in found.refused:
                continue
            try:
                error = worst_error(call(), expected)
                if error > TOLERANCE:
                    found.refused[name] = f"wrong by {error:.1e} of the largest entry in {case.name}"
                elif case.timed:
                    times[name] = clock(name, call)
            except (RuntimeError, NotImplementedError, ValueError) as failure:  # out of memory, no kernel, ...
                lines = str(failure).strip().splitlines() or [type(failure).__name__]
                found.refused[name] = f"{lines[0][:200]} in {case.name}"
        if case.timed:
            found.milliseconds[case.name] = times
    return found


def worst_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of two lists of tensors, relative to each one's largest entry; inf where not finite."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if b.numel():
            error = float((a.to(b) - b).abs().amax() / b.abs().amax().clamp(min=1e-30))
            worst = max(worst, error if error == error else float("inf"))
    return worst


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call, the device waited for."""
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        devices.synchronize(device)
        start = time.perf_counter()
        call()
        devices.synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times[1:])[repeats // 2]


def table_path(device: torch.device) -> Path:
    """Where the table of this card is kept, in the user's cache."""
    found = machine(device)
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{device.type} {found.get('card', '')}").strip("-").lower()
    return cache_folder() / "tuning" / f"{name}.json"


def save_table(table: Table, device: torch.device) -> Path:
    """Write the table, which counts from now on, in this process too. Its path."""
    path = table_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n")
    _choices.cache_clear()
    return path


def load_table(device: torch.device) -> Table | None:
    """The table of this card and these versions; None without one."""
    path = table_path(device)
    try:
        table = msgspec.json.decode(path.read_bytes(), type=Table)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        logger.warning(f"{path} is left unread ({error}): run `groundingdino selfcheck --tune` again")
        return None
    here = machine(device)
    if table.machine != here:
        other = ", ".join(f"{name} {value}" for name, value in table.machine.items() if here.get(name) != value)
        logger.warning(f"{path} was measured with {other}: run `groundingdino selfcheck --tune` again")
        return None
    return table


@functools.cache
def _choices(device: torch.device) -> dict[str, str]:
    table = load_table(device)
    found = {} if table is None else {name: measured.fastest() for name, measured in table.operations.items()}
    return {name: formulation for name, formulation in found.items() if formulation is not None}


@torch.compiler.assume_constant_result
def choice(device: torch.device, operation: str) -> str | None:
    """The formulation of `operation` that was measured to be the fastest on `device`; None where nothing was measured.

    The table is read once in a process. On a CPU there is nothing to choose: its kernels are the fastest.
    """
    return None if device.type == "cpu" else _choices(device).get(operation)
