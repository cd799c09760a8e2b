"""Several processes: the process group by device, and the few collectives the library needs.

Every function also works in a single process without a process group, where it does the obvious thing.
"""

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from groundingdino.runtime import devices, environment
from groundingdino.runtime.messages import brief

T = TypeVar("T")

logger = logging.getLogger(__name__)

# In the message of an exchange that failed. CANN's codes EI... are HCCL's; the host may learn of one at any later wait.
EXCHANGE_FAILED = re.compile(r"gloo|hccl|nccl|\bEI\d{4}\b", re.IGNORECASE)
GRACE = 5.0  # seconds for the other processes to notice that a collective has failed
POLL = 0.05  # seconds between two looks at whether the others have arrived
_store: dist.Store | None = None  # of this run's processes
_patient: dist.ProcessGroupGloo | None = None  # the same processes, over gloo and without a time-out
_patience = 600.0  # seconds without a sign of work from a process that is waited for
_waits = 0  # of this process so far
_noted = 0.0  # when this process has last shown that it works


class ProcessLostError(ConnectionError):
    """Another process of the run was killed, stopped, or hangs."""

    def __str__(self) -> str:
        return f"{super().__str__()}, and go on with --resume auto"


# Host objects and barriers travel over gloo, so that they never touch the device's stream.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}


@dataclass(frozen=True)
class World:
    """This process's place among all of them."""

    rank: int  # 0 .. size - 1 over all hosts
    local_rank: int  # on this host; the index of its device
    size: int
    device: torch.device


def init(device: str = "auto", *, timeout_minutes: float = 10.0) -> World:
    """Pick this process's device, make it the current one and, under torchrun, join the process group.

    Reads torchrun's RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. `timeout_minutes` bounds each collective
    and the start: a rank that died ends the others with an error instead of a hang. HCCL's own limit,
    HCCL_EXEC_TIMEOUT, becomes a little lower unless it is set already; it would be 30 minutes.
    Raises ValueError when the device cannot be used.
    """
    chosen = devices.pick_device(device)
    devices.prepare_device(chosen)
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return World(0, 0, 1, chosen)
    if chosen.type not in BACKENDS:
        raise ValueError(f"several processes on {chosen.type!r} are not supported: use one of {', '.join(BACKENDS)}")
    global _store, _patience, _patient
    if not dist.is_initialized():
        bound = None if chosen.type == "cpu" else chosen
        timeout = timedelta(minutes=timeout_minutes)
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun keeps one store over its restarts; without a prefix the processes of the second attempt would wait
        # for the dead ones of the first (torch 2.9).
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        _store, _patience = store, timeout.total_seconds()
        if chosen.type == "npu":
            os.environ.setdefault("HCCL_EXEC_TIMEOUT", str(max(1, int(0.9 * _patience))))
        hosts = size // int(os.environ.get("LOCAL_WORLD_SIZE", size))
        for problem in environment.hccl_problems(os.environ, hosts) if chosen.type == "npu" and rank == 0 else ():
            logger.warning(problem)
        dist.init_process_group(
            BACKENDS[chosen.type], store=store, rank=rank, world_size=size, timeout=timeout, device_id=bound
        )
        # Made directly: `new_group` would ask for a backend of the device that the processes are bound to.
        _patient = dist.ProcessGroupGloo(dist.PrefixStore("patient", store), rank, size, timedelta(days=30))
    return World(dist.get_rank(), devices.local_rank(), dist.get_world_size(), chosen)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank; 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 in a single process."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and logs."""
    return rank() == 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The element-wise sum over all processes of a tensor on the host: a new one of the same shape.

    Over gloo: the device is not waited for, and a process that is gone is noticed at once.
    """
    total = tensor.clone()
    if world_size() > 1:
        with naming_lost_processes():
            dist.all_reduce(total)
    return total


def gather_objects(value: T) -> list[T]:
    """Every process's picklable `value`, in rank order, on every process."""
    if world_size() == 1:
        return [value]
    wait_for_others()
    gathered: list[T | None] = [None] * world_size()
    with naming_lost_processes():
        dist.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value]


def broadcast_object(value: T, source: int = 0) -> T:
    """The picklable `value` of the process `source`, the main one by default, on every process."""
    if world_size() == 1:
        return value
    wait_for_others()
    box = [value]
    with naming_lost_processes():
        dist.broadcast_object_list(box, src=source)
    return box[0]


def note_progress() -> None:
    """Show the others that this process works; whoever waits for it in `wait_for_others` then has patience. Cheap."""
    global _noted
    now = time.monotonic()
    if _store is not None and now - _noted > 1.0:
        _noted = now
        _store.set(f"works {rank()}", str(now))


def wait_for_others(patience: float | None = None) -> None:
    """Wait until every process is here, however long the others work before they come.

    A process that neither arrives nor notes any progress for `patience` seconds (default: the run's time-out) is lost,
    and so is one that has ended: ProcessLostError names it. All processes must call this equally often.
    """
    global _waits
    if _store is None or _patient is None or world_size() == 1:
        return
    _waits += 1
    patience = _patience if patience is None else patience
    _store.set(f"arrived {_waits} {rank()}", "1")
    work = _patient.allreduce([torch.zeros(1)])  # type: ignore[attr-defined]
    signs: dict[int, tuple[bytes, float]] = {}  # of each process: the last sign of work, and when it was new
    with naming_lost_processes():
        while not work.is_completed():
            time.sleep(POLL)
            for other in range(world_size()):
                sign = _sign_of(other)
                seen, since = signs.setdefault(other, (sign, time.monotonic()))
                if sign != seen:
                    signs[other] = (sign, time.monotonic())
                elif time.monotonic() - since > patience and not _store.check([f"arrived {_waits} {other}"]):
                    _patient.abort()  # else this process could not end
                    raise ProcessLostError(_missing([other], "did not answer in time"))
        work.wait()
    _store.delete_key(f"arrived {_waits - 1} {rank()}")


def _sign_of(other: int) -> bytes:
    """What the process has noted last."""
    assert _store is not None
    return _store.get(f"works {other}") if _store.check([f"works {other}"]) else b""


def highest(code: int) -> int:
    """The highest `code` of all processes, on every one of them. Waits for them on the host, not on the device."""
    if world_size() == 1:
        return code
    found = torch.tensor(code)
    with naming_lost_processes():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


@contextlib.contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turn the failure of a collective into ProcessLostError, which names the processes that did not take part.

    The others leave a note in the store that all share; whoever has left none after `GRACE` seconds is lost.
    """
    try:
        yield
    except RuntimeError as error:
        failed = isinstance(error, dist.DistError) or EXCHANGE_FAILED.search(str(error))
        if not failed or _store is None:
            raise
        raise ProcessLostError(_what_failed(error)) from error


def _what_failed(error: Exception) -> str:
    """Which processes do not answer, or that all run and cannot reach each other."""
    assert _store is not None
    own = f"process {rank()} of {world_size()}"
    try:
        _store.set(f"waited {rank()}", "1")
        time.sleep(GRACE)
        lost = [other for other in range(world_size()) if not _store.check([f"waited {other}"])]
    except RuntimeError:
        return f"{own} can no longer reach the first host: look for the message of a process there, or at the network"
    if not lost:
        said = brief(str(error).strip().rpartition("\n")[2])  # the library's own words come last
        return (
            f"{own} cannot exchange with the others, all of which run: look at the network between the devices ({said})"
        )
    return _missing(lost, "did not answer in time" if "timed out" in str(error).lower() else "has ended")


def _missing(lost: list[int], cause: str) -> str:
    return (
        f"process {', '.join(map(str, lost))} of {world_size()} {cause}; look for its own message, or for the "
        "out-of-memory killer in the system's log"
    )


def barrier() -> None:
    """Wait until every process has arrived."""
    wait_for_others()
    highest(0)  # over gloo, also in a group that is not ours; torch's own barrier takes the device's backend
