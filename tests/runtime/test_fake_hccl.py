"""The stand-in for HCCL that the ranks of the simulated NPU use: sums, order, and errors instead of hangs."""

import subprocess
import sys
from pathlib import Path

import pytest
from fake_cann import build

pytestmark = pytest.mark.skipif(build.missing_compiler() is not None, reason=f"{build.missing_compiler()}")

RANK = """
import ctypes, sys
hccl = ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
rank, size, info = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].encode()
comm = ctypes.c_void_p()
assert hccl.HcclCommInitRootInfo(size, ctypes.c_char_p(info), rank, ctypes.byref(comm)) == 0
count = 300_000  # more than one chunk of shared memory
data = (ctypes.c_float * count)(*[rank + i % 7 for i in range(count)])
n = ctypes.c_uint64(count)
def all_reduce(count=n):
    return hccl.HcclAllReduce(data, data, count, 4, 0, comm, None)
"""
WORKS = """
assert all_reduce() == 0
assert all(data[i] == 3 + 3 * (i % 7) for i in range(count))
gathered = (ctypes.c_float * 6)()
mine = (ctypes.c_float * 2)(rank, -rank)
assert hccl.HcclAllGather(mine, gathered, ctypes.c_uint64(2), 4, comm, None) == 0
assert list(gathered) == [0, 0, 1, -1, 2, -2]
assert hccl.HcclBroadcast(mine, ctypes.c_uint64(2), 4, 2, comm, None) == 0
assert list(mine) == [2, -2]
"""
DIFFERS = "assert all_reduce(ctypes.c_uint64(10 + rank)) == 1  # a parameter error"
DIES = """
if rank == 1:
    sys.exit(0)
assert all_reduce() == 9  # a time-out
"""


@pytest.mark.parametrize("code", [WORKS, DIFFERS, DIES], ids=["collectives", "different calls", "a dead rank"])
def test_three_ranks(code: str, tmp_path: Path) -> None:
    library = str(build.fake_cann()["libhccl.so"])
    name = f"/fake-hccl-test-{tmp_path.name}-{abs(hash(tmp_path))}"
    started = []
    for rank in range(3):
        command = [sys.executable, "-c", RANK + code, library, str(rank), "3", name]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": {"FAKE_HCCL_TIMEOUT_S": "5"}}
        started.append(subprocess.Popen(command, **options))
    outputs = [process.communicate(timeout=60)[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
