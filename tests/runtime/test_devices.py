"""The device layer where there is only a CPU; test_npu_torch_npu.py has the NPU side."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from groundingdino.runtime import bootstrap, devices

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
without_torch_npu = pytest.mark.skipif(bootstrap.has_torch_npu(), reason="torch_npu is installed here")


def run_python(code: str, *paths: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("TORCH_DEVICE_BACKEND_AUTOLOAD", "THP_MEM_ALLOC_ENABLE")
    }
    path = os.pathsep.join(str(p) for p in (*paths, ROOT))
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**inherited, "PYTHONPATH": path, **variables}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def torch_npu_without_cann(tmp_path_factory) -> Path:
    """A folder with a torch_npu that, like the real wheel, torch loads by itself and that links to CANN's libraries."""
    folder = tmp_path_factory.mktemp("torch_npu_without_cann")
    (folder / "torch_npu").mkdir()
    code = "import ctypes\nctypes.CDLL('libhccl.so')\ndef _autoload():\n    pass\n"
    (folder / "torch_npu" / "__init__.py").write_text(code)
    info = folder / "torch_npu-2.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.9.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return folder


def test_auto_picks_the_cpu_where_there_is_nothing_better():
    if not torch.cuda.is_available() and not bootstrap.has_torch_npu():
        assert devices.pick_device("auto") == CPU
    assert devices.pick_device("cpu") == CPU


@pytest.mark.parametrize("name", ["tpu", "", "cpux", "npu_0"])
def test_an_unknown_device_is_refused_with_the_choices(name):
    with pytest.raises(ValueError, match="unknown device .* use auto, cpu, cuda, npu, mps"):
        devices.pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_without_a_gpu_says_so():
    with pytest.raises(ValueError, match="device 'cuda' cannot be used: .*no driver"):
        devices.pick_device("cuda")


@without_torch_npu
def test_npu_without_torch_npu_says_what_to_install():
    with pytest.raises(ValueError, match="torch_npu is not installed: pip install torch_npu==2.9.0") as caught:
        devices.pick_device("npu")
    assert "\n" not in str(caught.value)


def test_npu_without_cann_names_the_missing_library(torch_npu_without_cann):
    code = (
        "from groundingdino.runtime import devices\ntry: devices.pick_device('npu')\nexcept ValueError as e: print(e)"
    )
    result = run_python(code, torch_npu_without_cann)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert "CANN is not found (libascendcl.so" in result.stdout and "set_env.sh" in result.stdout


def test_import_works_where_torch_npu_is_installed_without_cann(torch_npu_without_cann):
    plain = run_python("import torch", torch_npu_without_cann)
    assert plain.returncode != 0 and "Failed to load the backend extension" in plain.stderr  # the hazard is there
    code = "import groundingdino, os, torch; print(torch.ones(2).sum(), 'TORCH_DEVICE_BACKEND_AUTOLOAD' in os.environ)"
    result = run_python(code, torch_npu_without_cann)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "tensor(2.) False\n"  # the variable is set for torch's import only
    code = "from groundingdino.runtime.devices import pick_device; print(pick_device())"
    auto = run_python(code, torch_npu_without_cann)
    assert auto.stdout.strip() in ("cpu", "cuda:0"), auto.stderr
    assert "not using an NPU: torch_npu is installed but CANN is not found" in auto.stderr


def test_the_users_choices_are_kept():
    tuned = "import groundingdino, os, torch; groundingdino.tune_process(torch.device('cpu')); print(os.environ[{!r}])"
    huge_pages = tuned.format("THP_MEM_ALLOC_ENABLE")
    assert run_python(huge_pages, THP_MEM_ALLOC_ENABLE="0").stdout == "0\n"
    if sys.platform == "linux":
        assert run_python(huge_pages).stdout == "1\n"
    autoload = tuned.format("TORCH_DEVICE_BACKEND_AUTOLOAD")
    assert run_python(autoload, TORCH_DEVICE_BACKEND_AUTOLOAD="1").stdout == "1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="madvise is Linux's")
def test_large_tensors_of_a_tuned_process_ask_for_huge_pages_unless_switched_off():
    # torch aligns exactly the memory that it passes to madvise(MADV_HUGEPAGE) to whole pages
    code = "import groundingdino, mmap, torch; {}; print(torch.empty(1 << 20).data_ptr() % mmap.PAGESIZE)"
    tuned = code.format("groundingdino.tune_process(torch.device('cpu'))")
    assert int(run_python(tuned).stdout) == 0
    assert int(run_python(tuned, THP_MEM_ALLOC_ENABLE="0").stdout) != 0
    assert int(run_python(code.format("groundingdino.load_model")).stdout) != 0


def test_autocast_runs_products_in_the_precision_asked_for():
    a = torch.ones(4, 4)
    for precision, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.items():
        with devices.autocast(CPU, precision):
            assert (a @ a).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16), devices.autocast(CPU, "fp32"):
        assert (a @ a).dtype == torch.float32
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        devices.autocast(CPU, "fp8")


@pytest.mark.parametrize(
    ("flags", "precision", "slow"),
    [("avx2 fma", "bf16", True), ("avx512f avx512_bf16", "bf16", False), ("amx_bf16", "bf16-mixed", False),
     ("avx512_bf16", "fp16", True), ("avx2", "fp32", False), ("", "bf16", False)],
)  # fmt: skip
def test_a_processor_without_instructions_for_a_half_precision_is_said_to_be_slow(
    flags, precision, slow, tmp_path, monkeypatch
):
    (tmp_path / "cpuinfo").write_text(f"model name : x\nflags\t\t: {flags}\n" if flags else "Features : asimd\n")
    monkeypatch.setattr(devices, "CPU_FACTS", tmp_path / "cpuinfo")
    problem = devices.slow_precision(CPU, precision)
    assert (problem is not None) == slow
    assert devices.slow_precision(torch.device("meta"), precision) is None


def test_only_fp16_scales_the_loss():
    assert devices.grad_scaler(CPU, "fp16").is_enabled()
    assert not devices.grad_scaler(CPU, "bf16").is_enabled()
    assert not devices.grad_scaler(CPU, "fp32").is_enabled()


def test_the_fused_adamw_takes_the_same_steps_as_the_plain_one():
    torch.manual_seed(0)
    start, gradients = torch.randn(7, 5), torch.randn(3, 7, 5)
    ends = []
    for options in (devices.fused_adamw(CPU), {"foreach": False, "fused": False}):
        weight = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1, **options)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        ends.append(weight.detach())
    assert devices.fused_adamw(CPU) == {"fused": True}
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)  # the order of the same float32 operations differs


def test_the_local_rank_comes_from_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert devices.local_rank() == 0
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert devices.local_rank() == 3


def test_cpu_helpers_do_nothing_and_report_memory():
    devices.prepare_device(CPU)
    devices.synchronize(CPU)
    assert devices.random_state(CPU) is None
    devices.set_random_state(CPU, torch.zeros(4, dtype=torch.uint8))
    assert not devices.pins_memory(CPU)
    assert 10 < devices.peak_memory_mib(CPU) < 1e6


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_memory_is_kept_unless_the_user_decides(monkeypatch):
    calls = []
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *a: calls.append(a)))
    for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(name, "1")
        devices.tune_process(CPU)
        assert calls == []
        monkeypatch.delenv(name)
    devices.tune_process(torch.device("meta"))
    assert calls == []
    devices.tune_process(CPU)
    assert calls == [(-4, 0), (-1, -1)]


def test_loader_processes_start_as_usual_but_beside_an_npu():
    assert devices.loader_context(CPU, 2, "torch") is None and devices.loader_context(CPU, 0, "torch") is None
    npu = SimpleNamespace(type="npu")
    assert devices.loader_context(npu, 0, "torch") is None
    assert devices.loader_context(npu, 1, "torch").get_start_method() == "forkserver"
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD" not in os.environ
