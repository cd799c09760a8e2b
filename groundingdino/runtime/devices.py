"""The one place that knows devices: which to use, how to set it up, and what differs between them.

cpu, cuda, npu (Ascend, through torch_npu) and mps. Nothing else in the library names a backend.
"""

import ctypes
import importlib
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from groundingdino.runtime import bootstrap, threads

DEVICE_TYPES = ("cpu", "cuda", "npu", "mps")
MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_MAX = -1, -4  # of glibc's malloc.h
CPU_FACTS = Path("/proc/cpuinfo")  # of Linux; on x86 it lists the instructions under "flags"
HALF_INSTRUCTIONS = {"bf16": {"avx512_bf16", "amx_bf16"}, "fp16": {"avx512_fp16", "amx_fp16"}}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def local_rank() -> int:
    """This process's number on its host, as torchrun sets it; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def npu_problem() -> str | None:
    """Why no NPU can be used, in one line: no torch_npu, no CANN, or no card. None where one can; imports torch_npu."""
    if not bootstrap.has_torch_npu():
        return "torch_npu is not installed: pip install torch_npu==2.9.0 (its version must match torch's)"
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        missing = bootstrap.missing_cann_library()
        if missing is None:
            return f"torch_npu is installed but does not load ({_one_line(error)}): its version must match torch's"
        return (
            f"torch_npu is installed but CANN is not found ({missing}): install CANN or source its set_env.sh, "
            "usually /usr/local/Ascend/ascend-toolkit/set_env.sh"
        )
    npu = torch.get_device_module("npu")
    if not npu.is_available() or npu.device_count() == 0:
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "unset")
        return (
            f"torch_npu and CANN are installed but no card is visible (ASCEND_RT_VISIBLE_DEVICES {visible}): "
            "look at `npu-smi info`; a container needs --device=/dev/davinci0 and the driver's folders"
        )
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _accelerator_problem(kind: str) -> str | None:
    if kind == "npu":
        return npu_problem()
    if kind == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device (a CPU build of torch, or no driver): look at `nvidia-smi`"
    if kind == "mps" and not torch.backends.mps.is_available():
        return "torch sees no Apple GPU"
    return None


def _choose_kind() -> str:
    if bootstrap.has_torch_npu():
        problem = npu_problem()
        if problem is None:
            return "npu"
        warnings.warn(f"not using an NPU: {problem}", stacklevel=3)
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_device(name: str = "auto") -> torch.device:
    """The device to use: "auto" (npu, then cuda, then cpu), or a name such as "cpu", "npu", "cuda:1".

    Without an index an accelerator gets this process's local rank. "mps" is used only when asked for.
    Raises ValueError, in one line that says which part is missing, when the device cannot be used.
    """
    kind, _, index_text = name.partition(":")
    kind = _choose_kind() if kind == "auto" else kind
    if kind not in DEVICE_TYPES:
        raise ValueError(
            f"unknown device {name!r}: use auto, {', '.join(DEVICE_TYPES)}, or one with an index as in npu:0"
        )
    problem = _accelerator_problem(kind)
    if problem is not None:
        raise ValueError(f"device {name!r} cannot be used: {problem}")
    if kind in ("cpu", "mps"):
        return torch.device(kind)
    if index_text and not index_text.isdecimal():
        raise ValueError(f"device {name!r}: the part after the colon must be a number")
    index = int(index_text) if index_text else local_rank()
    count = torch.get_device_module(kind).device_count()
    if index >= count:
        raise ValueError(
            f"device {kind}:{index} does not exist, this process sees {count}: start fewer processes a host"
        )
    return torch.device(kind, index)


def prepare_device(device: torch.device) -> None:
    """Make an accelerator this thread's current device and able to run the model; `load_model` does it, too.

    On an NPU it also switches off two modes of torch_npu: private tensor formats, which the gradient of deformable
    attention rejects (they are on by default on Atlas A2), and compiling each new operator shape, which takes seconds
    where images come in many shapes. Nothing happens on a CPU.
    """
    if device.type in ("cuda", "npu"):
        torch.get_device_module(device).set_device(device)
    if device.type == "npu":
        npu = torch.get_device_module(device)
        npu.set_compile_mode(jit_compile=False)
        npu.config.allow_internal_format = False


def tune_process(device: torch.device, *, fast_fp32: bool = False) -> None:
    """Settings of the whole process that make it faster on `device`, or equal to other devices; to be made early.

    Nothing in the library calls this: importing it and loading a model leave the process as it was. The programs of
    `groundingdino.cli` call it before their first tensor, and so may you. It changes, and never back:

    * Linux: environment variable `THP_MEM_ALLOC_ENABLE=1`, unless it is set: huge pages for CPU tensors from 2 MiB.
      Without them half of a CPU run is page faults. torch reads it at its first large allocation.
    * cpu: glibc's allocator keeps freed memory (`mallopt` M_MMAP_MAX and M_TRIM_THRESHOLD), unless
      MALLOC_MMAP_MAX_ or MALLOC_TRIM_THRESHOLD_ is set.
    * cpu, Linux: before each step and image torch's number of threads is set to the cores that other programs leave
      free (`runtime.threads`), unless OMP_NUM_THREADS is set. Rounding may differ with the number of threads.
    * cuda: TF32 for matmuls and convolutions: `fast_fp32`.
    * npu: HF32 for matmuls and convolutions: `fast_fp32`.

    `fast_fp32` lets float32 matmuls and convolutions use fewer bits. It is off by default, unlike for convolutions in
    torch and torch_npu, so that float32 results agree between devices.
    """
    if sys.platform == "linux":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if device.type == "cpu":
        _keep_freed_memory()
        threads.follow_free_cores()
    elif device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = fast_fp32
        torch.backends.cudnn.allow_tf32 = fast_fp32
    elif device.type == "npu":
        npu = torch.get_device_module(device)
        npu.conv.allow_hf32 = fast_fp32
        npu.matmul.allow_hf32 = fast_fp32


def make_deterministic(device: torch.device) -> str:
    """Let `device` compute the same numbers in every run, for the whole process; what that costs, in one sentence.

    An operator that torch has in no deterministic form warns once and stays as it is. To be called before the first
    tensor: cuBLAS and HCCL read their variables when they start.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        return "deterministic: gradients of deformable attention are summed in 64-bit integers, cuDNN does not search"
    if device.type == "npu":
        os.environ.setdefault("HCCL_DETERMINISTIC", "true")
        return (
            "deterministic: gradients of deformable attention are summed in sorted order, not by CANN's operator, "
            "which then uses a single core; matmuls and collectives are slower"
        )
    return "deterministic: CPU results depend on nothing but the number of threads; this setting makes no difference"


def _keep_freed_memory() -> None:
    """Let freed buffers wait for the next tensor instead of going back to the system (glibc).

    A buffer that was given back costs page faults when the next one is asked for. MM-GDINO-B without: a training step
    (checkpointed, 640x853) 8 % slower, prediction 2 %, and up to 0.15 GiB smaller at the peak. As with an accelerator's
    memory, the process stays as large as it once was. Nothing happens with other C libraries, or where the user has set
    MALLOC_MMAP_MAX_ or MALLOC_TRIM_THRESHOLD_.
    """
    if sys.platform == "linux" and not {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(MALLOPT_MMAP_MAX, 0)  # all buffers in the heap
            mallopt(MALLOPT_TRIM_THRESHOLD, -1)  # which never shrinks


def slow_precision(device: torch.device, precision: str) -> str | None:
    """Why `precision` takes longer than float32 on `device`, in one line; None where it does not, or nobody knows."""
    kind = precision.partition("-")[0]
    if device.type != "cpu" or kind == "fp32" or not CPU_FACTS.exists():
        return None
    flags = set(CPU_FACTS.read_text(errors="replace").partition("flags")[2].partition("\n")[0].split())
    if not flags or flags & HALF_INSTRUCTIONS[kind]:
        return None
    return f"this processor has no instructions for {kind}: {precision} will be slower than fp32, and less exact"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Context manager for the forward pass. `precision` is "fp32" (autocast off), "bf16" or "fp16"."""
    dtype = _dtype(precision)
    if precision == "fp32":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Loss scaler: active for "fp16", a pass-through for "fp32" and "bf16", whose range needs none."""
    _dtype(precision)
    scaler = _NpuGradScaler if device.type == "npu" else torch.amp.GradScaler
    return scaler(device.type, enabled=precision == "fp16")


class _NpuGradScaler(torch.amp.GradScaler):
    """torch's own, but for what an NPU cannot do.

    It inverts its scale in float64, which an NPU does not have; the scale is a power of two, so float32 is exact. And
    it leaves it to a fused optimizer to heed `found_inf`, see `fused_adamw_heeds_found_inf`; here the host reads it,
    once a step. (torch_npu's own scaler reads it more often and cannot drive torch's fused AdamW.)
    """

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        if not self._enabled:
            return
        self._check_scale_growth_tracker("unscale_")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is not OptState.READY:
            raise RuntimeError("unscale_() has already been called on this optimizer since the last update()")
        assert self._scale is not None  # made by the first scale()
        found_inf = torch.zeros((), device=self._scale.device)
        state["found_inf_per_device"] = self._unscale_grads_(optimizer, self._scale.reciprocal(), found_inf, False)
        state["stage"] = OptState.UNSCALED

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update()")
        if state["stage"] is OptState.READY:
            self.unscale_(optimizer)
        result = self._maybe_opt_step(optimizer, state, *args, **kwargs)
        state["stage"] = OptState.STEPPED
        return result


def _dtype(precision: str) -> torch.dtype:
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def fused_adamw(device: torch.device) -> dict[str, Any]:
    """Keyword arguments that make `torch.optim.AdamW` one kernel per step instead of one per parameter."""
    return {"fused": device.type in ("cpu", "cuda", "npu")}


def fused_adamw_heeds_found_inf(device: torch.device) -> bool:
    """Whether the fused AdamW leaves out a step by itself where its `found_inf` is set.

    torch_npu 2.9.0's takes no notice of it and would put NaN into the weights (op-plugin, FusedAdamWKernelNpuOpApi).
    """
    return device.type in ("cpu", "cuda")


def loader_context(device: torch.device, workers: int, preload: str) -> BaseContext | None:
    """How `workers` processes that load data beside a program that uses `device` are started; None: as usual.

    Beside an NPU they are not forked from this process, which would hand them its driver's mappings and the locks of
    its threads, but from a server that has never seen the device: a fresh process with the module `preload` imported.
    As with "spawn", the data set is pickled, and a script that starts them needs `if __name__ == "__main__"`.
    """
    if device.type != "npu" or workers == 0:
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    before = os.environ.get(bootstrap.AUTOLOAD)
    os.environ[bootstrap.AUTOLOAD] = "0"  # none of them loads torch_npu
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ[bootstrap.AUTOLOAD]
        else:
            os.environ[bootstrap.AUTOLOAD] = before
    return context


def pins_memory(device: torch.device) -> bool:
    """Whether batches should be pinned by the loader, so that a non_blocking copy to `device` does not stall."""
    return device.type in ("cuda", "npu")


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. The host does not wait for what is queued there: it copies from page-locked memory."""
    if tensor.device.type != "cpu" or not pins_memory(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Starts to copy a tensor to the host; the function that it returns waits for the copy, not for later work."""
    if not pins_memory(tensor.device):
        host = tensor.cpu()
        return lambda: host
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.get_device_module(tensor.device).Event()
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait


def pairs_at_once(device: torch.device) -> int:
    """How many (image, caption) pairs to predict in one pass. On a CPU several take as long as one after another."""
    return 1 if device.type == "cpu" else 4


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on `device` has run. A no-op on cpu."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def random_state(device: torch.device) -> Tensor | None:
    """State of the device's random generator, a uint8 CPU tensor for a checkpoint; None on cpu (torch's own state)."""
    return None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()


def set_random_state(device: torch.device, state: Tensor | None) -> None:
    """The inverse of `random_state`. A state of another kind of device cannot be used, so None is ignored."""
    if device.type != "cpu" and state is not None:
        torch.get_device_module(device).set_rng_state(state)


def memory_problem(error: BaseException) -> str | None:
    """What an error that means the end of memory should say, in one line; None of any other error."""
    text = " ".join(str(error).split())
    of_device = isinstance(error, torch.OutOfMemoryError) or "NPU out of memory" in text
    if not (of_device or isinstance(error, MemoryError) or "can't allocate memory" in text):
        return None
    size = re.search(r"Tried to allocate ([\d.]+ [KMG]iB)|tried to allocate (\d+) bytes", text)
    asked = "" if size is None else f", {size[1] or f'{int(size[2]) / 2**30:.1f} GiB'} were asked for"
    where = "the device" if of_device else "this machine"
    return (
        f"the memory of {where} is used up{asked}: try a smaller batch, smaller images or a precision of 16 bits; "
        "in training also --activation-checkpointing and fewer --data.workers"
    )


def peak_memory_mib(device: torch.device) -> float:
    """Most memory that tensors have used on `device`, in MiB, in this process; on cpu its peak resident set."""
    if device.type in ("cuda", "npu"):
        return torch.get_device_module(device).max_memory_allocated() / 2**20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
