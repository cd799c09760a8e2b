"""Importing the package and loading a model leave a process as it was; `tune_process` does what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden_cases import tiny_model

from groundingdino.checkpoints.model_file import save_detector

ROOT = Path(__file__).parents[2]
MAPPED = 64 << 20  # bytes: over the highest threshold that glibc adapts to, so malloc maps it unless told otherwise
PROBE = """
import ctypes, json, logging, os, sys, torch, warnings

def state():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    before = heap_bytes()
    block = libc.malloc(MAPPED)
    in_heap = heap_bytes() > before
    libc.free(block)
    return {
        "environment": dict(os.environ),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad": torch.is_grad_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "seed": torch.initial_seed(),
        "random": torch.get_rng_state().sum().item(),
        "large blocks come from the heap": in_heap,
        "loggers": [len(logging.getLogger(name).handlers) for name in ("", "groundingdino")],
        "warnings are shown as before": warnings.showwarning is showwarning,
    }

def heap_bytes():
    for line in open("/proc/self/maps"):
        if line.rstrip().endswith("[heap]"):
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            return end - start
    return 0

showwarning = warnings.showwarning
before = state()
import groundingdino
if sys.argv[1] == "load":
    groundingdino.load_model(sys.argv[2], device="cpu").predict(sys.argv[3], categories=["cat"])
else:
    groundingdino.tune_process(torch.device("cpu"))
print(json.dumps([before, state()]))
""".replace("MAPPED", str(MAPPED))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_detector(path, tiny_model())
    return path


def states(*arguments: str) -> tuple[dict, dict]:
    """Of a fresh process before and after."""
    unset = ("THP_MEM_ALLOC_ENABLE", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-c", PROBE, *arguments]
    done = subprocess.run(
        command, env={**inherited, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout.splitlines()[-1])
    return before, after


def test_importing_loading_and_predicting_change_nothing_of_the_process(checkpoint: Path, golden: Path) -> None:
    photo = golden / "photos" / "train2014" / "COCO_train2014_000000000001.jpg"
    before, after = states("load", str(checkpoint), str(photo))
    assert after == before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc, /proc")
def test_tune_process_changes_what_it_says_and_nothing_else() -> None:
    before, after = states("tune")
    assert not before["large blocks come from the heap"] and after["large blocks come from the heap"]
    assert after.pop("environment") == before.pop("environment") | {"THP_MEM_ALLOC_ENABLE": "1"}
    assert {name for name in after if after[name] != before[name]} == {"large blocks come from the heap"}
