"""The CPU kernels built for aarch64, the processor of Atlas hosts, and run by qemu.

Needs a cross compiler and qemu: apt-get install g++-aarch64-linux-gnu qemu-user.
"""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from ms_deform_attn_cases import CASES, arguments, flat
from op_checks import assert_same, output_and_gradients, upstream
from torch import Tensor

from groundingdino.ops import cpu_library, map_windows, ms_deform_attn_reference, window_attention_reference
from groundingdino.ops.ms_deform_attn import cpu
from groundingdino.ops.window_attention import backward as window_backward
from groundingdino.ops.window_attention import forward as window_forward

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ROOT = Path(__file__).parent.parent.parent
missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
    pytest.mark.skipif(cpu_library.library() is None, reason="sizes of workspaces come from this machine's kernels"),
]
TOLERANCE = 5e-6  # of the largest entry; sums in another order, float32


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with the kernels as setup.py compiles them, and the driver, both for aarch64."""
    folder = tmp_path_factory.mktemp("aarch64")
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    extension = setup.call_args.kwargs["ext_modules"][0]
    sources = [str(ROOT / source) for source in extension.sources]
    flags = [*extension.extra_compile_args, *extension.extra_link_args]
    library = [COMPILER, *flags, "-shared", "-fPIC", *sources, "-o", str(folder / "kernels.so")]
    driver = [
        COMPILER,
        "-O1",
        str(Path(__file__).with_name("aarch64_driver.cpp")),
        "-ldl",
        "-o",
        str(folder / "driver"),
    ]
    for command in (library, driver):
        subprocess.run(command, check=True)
    return folder


@pytest.fixture
def on_aarch64(built, monkeypatch):
    """Let the operators of these modules call their kernels in the emulator."""

    def call(kernel: str, sizes, instruction_set, tensors: tuple[Tensor | None, ...]) -> None:
        given = [len(sizes), *sizes, 0, len(tensors)]
        content = torch.tensor(given).numpy().tobytes()
        for tensor in tensors:
            assert tensor is None or tensor.is_contiguous()
            part = b"" if tensor is None else tensor.numpy().tobytes()
            content += torch.tensor([-1 if tensor is None else len(part)]).numpy().tobytes() + part
        (built / "input").write_bytes(content)
        suffix = {torch.float32: "float", torch.float64: "double"}[tensors[0].dtype]
        command = [built / "driver", built / "kernels.so", f"{kernel}_{suffix}", built / "input", built / "output"]
        subprocess.run([EMULATOR, "-L", "/usr/aarch64-linux-gnu", *map(str, command)], check=True, timeout=120)
        result, start = (built / "output").read_bytes(), 0
        for tensor in (t for t in tensors if t is not None):
            part = result[start : start + tensor.nbytes]
            start += tensor.nbytes
            tensor.view(-1).copy_(torch.frombuffer(bytearray(part), dtype=tensor.dtype)) if part else None
        assert start == len(result)

    def patch(*modules: ModuleType) -> None:
        for module in modules:
            monkeypatch.setattr(module, "call", call)

    return patch


@pytest.mark.parametrize("case", ["thirteen_channels", next(iter(CASES))])
def test_deformable_attention_equals_the_composite(on_aarch64, case):
    on_aarch64(cpu)
    value, shapes, locations, weights = arguments(CASES[case], torch.float32)
    out = cpu.forward(value, flat(shapes), locations, weights)
    found = [out, *cpu.backward(upstream(out), value, flat(shapes), locations, weights)]
    exact = [tensor.double() for tensor in (value, locations, weights)]
    assert_same(found, output_and_gradients(ms_deform_attn_reference, exact[0], shapes, *exact[1:]), TOLERANCE)


def test_window_attention_equals_plain_torch(on_aarch64):
    on_aarch64(sys.modules["groundingdino.ops.window_attention"])
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 130, 3, 3, 32), (3, 3, 32), (3, 16, 16))
    qkv, padding, bias = (torch.randn(size, generator=generator) for size in sizes)
    windows = map_windows(13, 10, 4, 2, qkv)
    out = window_forward(qkv, padding, bias, windows)
    found = [out, *window_backward(upstream(out), qkv, padding, bias, windows)]
    wide = map_windows(13, 10, 4, 2, qkv.double())
    expected = output_and_gradients(window_attention_reference, qkv.double(), padding.double(), bias.double(), wide)
    assert_same(found, expected, TOLERANCE)


def test_linear_layers_equal_plain_torch(on_aarch64):
    module = sys.modules["groundingdino.ops.linear"]
    on_aarch64(module)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((300, 96), (80, 96), (80,)))
    found = module.forward(x, weight, bias, "gelu")
    expected = torch.nn.functional.gelu(torch.nn.functional.linear(x.double(), weight.double(), bias.double()))
    assert_same([found], [expected], TOLERANCE)
