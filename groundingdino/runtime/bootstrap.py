"""What has to be settled before torch is imported. `groundingdino/__init__.py` imports this module first.

Two settings only, each left alone when the user has set it:

* `THP_MEM_ALLOC_ENABLE=1`: huge pages for large CPU tensors (>= 2 MiB). Without them half of a CPU run is page faults.
  Set it to 0 to switch it off. torch reads it at its first large allocation, not at its import.
* `TORCH_DEVICE_BACKEND_AUTOLOAD=0`, only where torch_npu is installed and CANN is not: there `import torch` itself
  would fail, because torch imports torch_npu by itself. A program that imports torch before groundingdino on such a
  machine has to set the variable itself.
"""

import ctypes
import importlib.util
import os
import sys

# What libtorch_npu.so and its own libraries link against and its wheel does not bring.
CANN_LIBRARIES = ("libascendcl.so", "libhccl.so", "libacl_op_compiler.so", "libge_runner.so", "libgraph.so")


def has_torch_npu() -> bool:
    """Whether the torch_npu package is installed. Does not import it."""
    return importlib.util.find_spec("torch_npu") is not None


def missing_cann_library() -> str | None:
    """The first of CANN's libraries that the dynamic loader cannot load, with its reason; None where all load."""
    for name in CANN_LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError as error:
            return f"{name} ({error})" if name not in str(error) else str(error)
    return None


def prepare() -> None:
    """Set the environment variables above for this process and its children. Idempotent."""
    if sys.platform == "linux":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "torch" in sys.modules or "TORCH_DEVICE_BACKEND_AUTOLOAD" in os.environ:
        return
    if has_torch_npu() and missing_cann_library() is not None:
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"


prepare()
