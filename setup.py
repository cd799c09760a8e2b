"""C++ extensions only; everything else is in pyproject.toml.

Every extension is optional: without a compiler or a toolkit the installation goes through, and the library says at run
time what is missing. The CPU kernels are a plain shared library (no torch headers), so that they build in seconds, in
pip's isolated build too, and fit any torch. The NPU binding needs the headers of torch and torch_npu, which pip's
isolated build does not see: `pip install --no-build-isolation -e .`. Neither is imported (torch_npu would need CANN).
"""

from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup

CPU_SOURCES = "groundingdino/ops/csrc/cpu"
NPU_SOURCES = "groundingdino/ops/csrc/npu"


def cpu_extension() -> Extension:
    """Attention and linear layers for CPUs; GCC and Clang only (it uses their vector types)."""
    kernels = ("ms_deform_attn", "window_attention", "linear")
    names = ("each_isa.inc", "simd.inc", "bfloat16.h", "parallel.h", *(f"{kernel}.inc" for kernel in kernels))
    return Extension(
        "groundingdino.ops._cpu_kernels",
        sources=[f"{CPU_SOURCES}/{kernel}.cpp" for kernel in kernels],
        depends=[f"{CPU_SOURCES}/{name}" for name in names],
        extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-Wno-psabi"],
        extra_link_args=["-pthread", "-ldl"],
        language="c++",
        optional=True,
    )


def npu_extensions() -> list[Extension]:
    """Deformable attention for Ascend NPUs, where torch_npu is installed; links to no file of CANN."""
    torch, torch_npu = find_spec("torch"), find_spec("torch_npu")
    if torch is None or torch_npu is None:
        return []
    torch_folder, npu_folder = Path(torch.origin).parent, Path(torch_npu.origin).parent
    torch_headers, npu_headers = torch_folder / "include", npu_folder / "include"
    headers = [torch_headers, torch_headers / "torch/csrc/api/include", npu_headers]
    headers += [npu_headers / "third_party/acl/inc", npu_headers / "third_party/hccl/inc"]
    extension = Extension(
        "groundingdino.ops._npu",
        sources=[f"{NPU_SOURCES}/register_npu.cpp"],
        depends=[f"{NPU_SOURCES}/aclnn_msda.h", f"{NPU_SOURCES}/schema.h"],
        include_dirs=[str(folder) for folder in headers],
        library_dirs=[str(torch_folder / "lib"), str(npu_folder / "lib")],
        libraries=["c10", "torch_cpu", "torch_npu", "dl"],
        extra_compile_args=["-O2", "-std=c++17", "-w"],  # torch_npu's headers warn a lot
        language="c++",
        optional=True,
    )
    return [extension]


setup(ext_modules=[cpu_extension(), *npu_extensions()])
