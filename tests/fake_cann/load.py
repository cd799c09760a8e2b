"""Makes torch_npu importable in this process over the fake CANN. Call `load()` before anything imports torch.

sys.path.insert(0, "tests/fake_cann"); import load; load.load()
"""

import ctypes
import os
import sys
from pathlib import Path

LIBRARIES: dict[str, ctypes.CDLL] = {}


def load() -> None:
    """Preloads the fakes, imports torch_npu and points groundingdino to the test build of the binding."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    sys.path.insert(0, str(Path(__file__).parent.parent.parent))
    from fake_cann import build

    for name, path in build.fake_cann().items():
        LIBRARIES[name] = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    sys.path.append(str(build.torch_npu_folder()))
    import torch_npu  # noqa: F401

    from groundingdino.ops.ms_deform_attn import npu

    npu.binding_file = build.npu_binding


def counters() -> dict[str, int]:
    """What the fake runtime saw since the process started: synchronisations, and copies and bytes by direction."""
    values = (ctypes.c_int64 * 5)()
    LIBRARIES["libascendcl.so"].fake_counters(values)
    names = ("synchronisations", "to_device", "bytes_to_device", "to_host", "bytes_to_host")
    return dict(zip(names, values, strict=True))


def pytest_configure() -> None:
    load()
