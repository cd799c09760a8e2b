"""What has to be settled before torch is imported. `groundingdino/__init__.py` calls this module first."""

import ctypes
import importlib
import importlib.util
import os
import sys

SPIN_COUNT, WAIT_POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"  # of GCC's OpenMP, which torch's wheels bring
BRIEF = "10000"  # turns of a waiting thread's loop, a fifth of a millisecond; its default, 300,000, is a time slice
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
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


def import_torch_without_cann() -> None:
    """Import torch here and now where its own import would fail, because torch_npu is installed and CANN is not.

    torch imports torch_npu by itself, unless TORCH_DEVICE_BACKEND_AUTOLOAD is 0 at that moment; it is set for that
    moment only. Nothing is done anywhere else, where the user has set the variable, or where torch is already imported:
    a program that imports torch before groundingdino on such a machine has to set the variable itself.
    """
    if "torch" in sys.modules or AUTOLOAD in os.environ or not has_torch_npu() or missing_cann_library() is None:
        return
    os.environ[AUTOLOAD] = "0"
    try:
        importlib.import_module("torch")
    finally:
        del os.environ[AUTOLOAD]


def wait_briefly() -> None:
    """Let a thread of torch's that waits for the others soon give its core to them.

    For our own programs, before torch is imported, as its OpenMP library reads the environment when it is loaded: it
    does nothing later, or where the user has decided. Beside other programs the others may be waiting for that core.
    """
    if "torch" not in sys.modules and WAIT_POLICY not in os.environ:
        os.environ.setdefault(SPIN_COUNT, BRIEF)
