"""C++ extensions only; everything else is in pyproject.toml.

Every extension is optional: without a compiler or a toolkit the installation goes through, and the library says at run
time what is missing. The CPU kernel is a plain shared library (no torch headers), so that it builds in seconds, in
pip's isolated build too, and fits any torch.
"""

from setuptools import Extension, setup

CPU_SOURCES = "groundingdino/ops/csrc/cpu"


def cpu_extension() -> Extension:
    """Multi-scale deformable attention for CPUs; GCC and Clang only (it uses their vector types)."""
    return Extension(
        "groundingdino.ops._msda_cpu",
        sources=[f"{CPU_SOURCES}/ms_deform_attn.cpp"],
        depends=[f"{CPU_SOURCES}/kernel.inc"],
        extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-Wno-psabi"],
        extra_link_args=["-pthread"],
        language="c++",
        optional=True,
    )


setup(ext_modules=[cpu_extension()])
