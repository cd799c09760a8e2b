"""Deformable attention's Triton kernels: interpreted on the CPU, compiled for several GPUs, run where there is one."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from ms_deform_attn_cases import CASES, arguments, flat
from op_checks import upstream

from groundingdino.ops.ms_deform_attn import triton as on_gpu
from groundingdino.ops.ms_deform_attn.reference import ms_deform_attn_backward_reference, ms_deform_attn_reference

triton = pytest.importorskip("triton", reason="Triton comes with torch on Linux only")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton_checks import EVERY_SIZE, ON_ANY_DEVICE, deterministic, equals_the_composite  # noqa: E402

from groundingdino.ops.ms_deform_attn import triton_kernels  # noqa: E402

TESTS = Path(__file__).parents[1]
TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
HEADS, RELEASED = 8, {"channels": 32, "levels": 4}
cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    """Each check's problem, made by Triton's interpreter, which has to be asked for before triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    program = [sys.executable, str(TESTS / "triton_checks.py")]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("check", [*EVERY_SIZE, *ON_ANY_DEVICE])
def test_interpreted_on_the_cpu(check, interpreted):
    assert interpreted[check] is None, interpreted[check]


def compiled(architecture: str, backward: bool, dtype: str = "fp32", sums: str = "fp32", measured: str | None = None):
    """The kernel of the released models' sizes, compiled for a target."""
    kernel = triton_kernels.backward_kernel if backward else triton_kernels.forward_kernel
    options = triton_kernels.launch_options(architecture, RELEASED["channels"], backward, measured)
    warps = options.pop("num_warps")
    constants = {"CHANNELS": RELEASED["channels"], "LEVELS": RELEASED["levels"], **options}
    if backward:
        constants["DETERMINISTIC"] = sums == "i64"
    types = {"value": f"*{dtype}", "out": f"*{dtype}", "grad_out": f"*{dtype}", "grad_value": f"*{sums}"}
    types |= dict.fromkeys(("locations", "weights", "grad_locations", "grad_weights", "scale"), "*fp32")
    types |= {"sizes": ("i32",) * (2 * RELEASED["levels"])} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = [name for name, kind in signature.items() if kind[0] == "*" or name.startswith("stride")]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[architecture], options={"num_warps": warps})


def resources(kernel, path: Path) -> dict[str, int]:
    """Registers a thread, bytes of shared memory, and what was spilled, as the compiler reports them."""
    if "hsaco" in kernel.asm:
        keys = {
            "registers": "vgpr_count",
            "shared": "group_segment_fixed_size",
            "spilled": "vgpr_spill_count",
            "spilled_scalars": "sgpr_spill_count",
        }
        text = kernel.asm["amdgcn"]
        return {name: int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for name, key in keys.items()}
    path.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    text = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    keys = {"registers": "REG", "shared": "SHARED", "spilled": "STACK"}
    return {name: int(re.search(rf"{key}:(\d+)", text)[1]) for name, key in keys.items()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A folder for what Triton compiles, so that it is compiled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_it_compiles_for_each_architecture_within_its_resources(architecture, backward, tmp_path):
    kernel = compiled(architecture, backward)
    used = resources(kernel, tmp_path / "kernel.cubin")
    print(architecture, "backward" if backward else "forward", used)
    assert all(used[name] == 0 for name in used if name.startswith("spilled"))
    assert used["shared"] <= 48 * 1024
    # 1024 threads fit on a multiprocessor (65,536 registers), and 1024 on a compute unit (4 * 64 * 512 of them)
    assert used["registers"] <= (128 if architecture == "gfx942" else 64)
    text = kernel.asm["amdgcn" if architecture == "gfx942" else "ptx"]
    assert re.search(r"global_load_dwordx4|ld\.global[^;]*\.v4", text), "pixels are not read 16 bytes at a time"


@pytest.mark.slow
@pytest.mark.parametrize("launch", triton_kernels.CANDIDATES)
def test_every_launch_that_tune_measures_compiles_within_a_multiprocessor(launch, tmp_path):
    for backward in (False, True):
        used = resources(compiled("sm_90", backward, measured=launch), tmp_path / "kernel.cubin")
        assert used["spilled"] <= (16 if backward else 0) and used["shared"] <= 48 * 1024
        assert used["registers"] * 32 * triton_kernels.CANDIDATES[launch].warps <= 65536


def test_tuning_also_measures_the_launches_that_are_used_without_it():
    used_without = {launch for pair in triton_kernels.LAUNCHES.values() for launch in pair}
    assert used_without <= set(triton_kernels.CANDIDATES.values())


@pytest.mark.parametrize("architecture", ["sm_80", "gfx942"])
@pytest.mark.parametrize(("dtype", "sums"), [("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "i64")])
def test_half_precision_and_deterministic_sums_compile(architecture, dtype, sums, tmp_path):
    kernel = compiled(architecture, backward=True, dtype=dtype, sums=sums)
    assert resources(kernel, tmp_path / "kernel.cubin")["registers"] <= 255


def test_a_gpu_where_triton_cannot_run_gets_the_composite_and_one_warning_with_the_reason(monkeypatch):
    """The CPU is a device that Triton cannot compile for, unless it interprets."""
    on_gpu.kernel_problem.cache_clear()
    value, shapes, locations, weights = arguments(CASES["one_point"], torch.float32)
    grad = upstream(torch.empty(1, 7, 24, dtype=torch.float32))
    with pytest.warns(UserWarning, match="slow: RuntimeError: 0 active drivers") as caught:
        out = on_gpu.forward(value, flat(shapes), locations, weights)
        grads = on_gpu.backward(grad, value, flat(shapes), locations, weights)
    assert len(caught) == 1
    assert torch.equal(out, ms_deform_attn_reference(value, shapes, locations, weights))
    expected = ms_deform_attn_backward_reference(grad, value, shapes, locations, weights)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half = on_gpu.forward(value.half(), flat(shapes), locations, weights)
        monkeypatch.setenv("GROUNDINGDINO_KERNELS", "off")
        on_gpu.forward(value.double(), flat(shapes), locations.double(), weights.double())
    assert half.dtype == torch.float16
    monkeypatch.setenv("GROUNDINGDINO_KERNELS", "require")
    with pytest.raises(RuntimeError, match="GROUNDINGDINO_KERNELS requires .* 0 active drivers"):
        on_gpu.forward(value, flat(shapes), locations, weights)


@pytest.mark.parametrize("key", ["ms_deform_attn", "ms_deform_attn_backward"])
def test_the_operators_have_a_kernel_for_cuda(key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"groundingdino::{key}", "CUDA")


class TestOnAGpu:
    pytestmark = cuda

    @pytest.mark.parametrize("case", EVERY_SIZE)
    def test_it_equals_the_composite(self, case):
        equals_the_composite(EVERY_SIZE[case], "cuda")

    @pytest.mark.parametrize("check", ON_ANY_DEVICE)
    def test_what_holds_on_any_device(self, check):
        ON_ANY_DEVICE[check]("cuda")

    def test_a_device_that_is_not_the_current_one_is_served(self):
        if torch.cuda.device_count() < 2:
            pytest.skip("one GPU")
        equals_the_composite(CASES["five_levels"], "cuda:1")

    def test_at_the_size_of_an_encoder_layer_two_deterministic_passes_have_the_same_bits(self):
        shapes = ((100, 167), (50, 84), (25, 42), (13, 21))
        tokens = sum(height * width for height, width in shapes)
        value, _, locations, weights = (
            t.cuda() if isinstance(t, torch.Tensor) else t
            for t in arguments((1, HEADS, 32, tokens, shapes, 4), torch.float32)
        )
        grad = torch.randn(1, tokens, HEADS * 32, device="cuda")
        with deterministic():
            first, again = (triton_kernels.backward(grad, value, flat(shapes), locations, weights)[0] for _ in range(2))
        assert torch.equal(first, again)
        unordered = triton_kernels.backward(grad, value, flat(shapes), locations, weights)[0]
        assert (unordered - first).abs().max() <= 1e-4 * first.abs().max()
