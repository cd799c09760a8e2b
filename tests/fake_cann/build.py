"""Compiles the fakes and finds torch_npu's wheel, once, into a cache folder outside the repository.

The cache is $GROUNDINGDINO_TEST_CACHE, by default ~/.cache/groundingdino-tests. A library is rebuilt when its sources,
the compiler flags or torch's version change. `python tests/fake_cann/build.py` fills the cache, the wheel included.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BINDING = ROOT / "groundingdino" / "ops" / "csrc" / "npu"
SIMULATOR = ROOT / "tests" / "npu_simulator"
TORCH_NPU = "torch_npu==2.9.0"
TORCH = Path(torch.__file__).parent
TORCH_FLAGS = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
TORCH_LIBRARIES = [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
# Libraries of CANN that torch_npu links against and takes nothing from.
EMPTY = (
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libmsprofiler.so",
    "libascend_hal.so",
)


def cache_folder() -> Path:
    default = Path.home() / ".cache" / "groundingdino-tests"
    return Path(os.environ.get("GROUNDINGDINO_TEST_CACHE", default))


@contextmanager
def _locked() -> Iterator[None]:
    """One builder at a time: test processes and ranks share the cache."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with open(cache_folder() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def missing_compiler() -> str | None:
    return None if shutil.which("g++") else "no g++"


def compile_library(name: str, sources: Sequence[Path], flags: Sequence[str], watch: Sequence[Path] = ()) -> Path:
    """The shared library `name` built from `sources`; RuntimeError with the compiler's output when that fails."""
    digest = hashlib.sha256(repr((name, list(flags), torch.__version__)).encode())
    for path in (*sources, *watch):
        digest.update(path.read_bytes())
    target = cache_folder() / digest.hexdigest()[:16] / name
    if target.exists():
        return target
    with _locked():
        if target.exists():
            return target
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        # -O1: built more often than run
        command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", f"-Wl,-soname,{name}", "-o", str(partial)]
        command += [str(source) for source in sources] + ["-Wl,-rpath,$ORIGIN", *flags]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-4000:]}")
        partial.rename(target)
    return target


@cache
def fake_cann() -> dict[str, Path]:
    """Library name -> file, in the order in which they have to be loaded."""
    runtime = compile_library("libascendcl.so", [HERE / "fake_runtime.cpp"], [])
    flags = [str(runtime), f"-Wl,-rpath,{runtime.parent}"]
    built = {"libascendcl.so": runtime}
    for name in EMPTY:
        built[name] = compile_library(name, [], ["-x", "c++", "/dev/null", "-x", "none", "-Wl,--no-as-needed", *flags])
    built["libhccl.so"] = compile_library("libhccl.so", [HERE / "fake_hccl.cpp"], flags)
    built["libopapi.so"] = compile_library("libopapi.so", [HERE / "fake_opapi.cpp"], flags)
    return built


@cache
def cpu_binding() -> Path:
    """The binding's contract header registered for CPU tensors."""
    flags = [f"-I{BINDING}", *TORCH_FLAGS, *TORCH_LIBRARIES, "-ldl"]
    return compile_library("cpu_binding.so", [HERE / "register_cpu.cpp"], flags, _binding_headers())


def _binding_headers() -> list[Path]:
    return sorted(BINDING.glob("*.h"))


def torch_npu_folder() -> Path:
    """The folder that holds torch_npu's unpacked wheel and nothing else, fetched once; RuntimeError where it cannot be.

    It is not installed into the environment: there every `import torch` would load it and fail without CANN.
    """
    version = f"{TORCH_NPU.replace('==', '-')}-{sysconfig.get_config_var('py_version_nodot')}"
    folder = cache_folder() / version
    if (folder / "torch_npu").exists():
        return folder
    with _locked():
        if (folder / "torch_npu").exists():
            return folder
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "1", "--timeout", "20"]
        result = subprocess.run([*pip, "--target", str(partial), TORCH_NPU], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{TORCH_NPU} cannot be installed here: {result.stderr.strip()[-400:]}")
        partial.rename(folder)
    return folder


@cache
def npu_binding() -> Path:
    """The binding as setup.py builds it where torch_npu can be found (and, without CANN, not imported)."""
    digest = hashlib.sha256(repr(("npu_binding", torch.__version__)).encode())
    for path in (ROOT / "setup.py", BINDING / "register_npu.cpp", *_binding_headers()):
        digest.update(path.read_bytes())
    folder = cache_folder() / digest.hexdigest()[:16]
    target = folder / "groundingdino" / "ops" / f"_npu{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        return target
    with _locked():
        command = [
            sys.executable,
            "setup.py",
            "build_ext",
            "--build-lib",
            str(folder),
            "--build-temp",
            f"{folder}-temp",
        ]
        path = os.pathsep.join(map(str, (torch_npu_folder(), *sys.path[1:])))
        env = {**os.environ, "PYTHONPATH": path}
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if not target.exists():
        raise RuntimeError(f"setup.py did not build the NPU binding:\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}")
    return target


@cache
def simulator() -> Path:
    """PyTorch's CPU kernels behind npu tensors."""
    wheel = torch_npu_folder() / "torch_npu"
    headers = [f"-I{wheel / 'include'}", *(f"-I{wheel}/include/third_party/{part}/inc" for part in ("acl", "hccl"))]
    libraries = [*TORCH_LIBRARIES, f"-L{wheel / 'lib'}", "-ltorch_npu"]
    return compile_library("simulator.so", [SIMULATOR / "simulator.cpp"], ["-w", *TORCH_FLAGS, *headers, *libraries])


def main() -> None:
    """Fill the cache."""
    torch_npu_folder(), fake_cann(), cpu_binding(), npu_binding(), simulator()
    print(f"the fakes and {TORCH_NPU} are in {cache_folder()}")


if __name__ == "__main__":
    main()
