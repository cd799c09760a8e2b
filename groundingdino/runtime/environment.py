"""What a report from a machine needs: driver, firmware, toolkit, the variables that matter, processors and memory."""

import contextlib
import getpass
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

PREFIXES = (
    "HCCL_",
    "GLOO_",
    "NCCL_",
    "ASCEND_",
    "TASK_QUEUE_",
    "PYTORCH_",
    "OMP_",
    "TORCH_",
    "CUDA_",
    "GROUNDINGDINO_",
)
VERSION_FILES = {  # name -> file, and what stands before the version in it
    "driver": ("/usr/local/Ascend/driver/version.info", "Version="),
    "firmware": ("/usr/local/Ascend/firmware/version.info", "Version="),
    "NVIDIA driver": ("/proc/driver/nvidia/version", "NVRM version: "),
}
HCCL_LEAST_CONNECT, HCCL_MOST_CONNECT = 120, 7200  # seconds that HCCL_CONNECT_TIMEOUT may be


def describe(root: Path = Path("/")) -> dict[str, object]:
    """Versions of driver, firmware and toolkit as far as there are any, variables, and NUMA nodes with their CPUs.

    `root` is where the file system begins (tests).
    """
    found: dict[str, object] = {}
    for name, (path, before) in VERSION_FILES.items():
        version = _after(root / path.lstrip("/"), before)
        if version:
            found[name] = version
    home = os.environ.get("ASCEND_HOME_PATH", "/usr/local/Ascend/ascend-toolkit/latest")
    for info in sorted((root / home.lstrip("/")).glob("*/ascend_toolkit_install.info")):
        found["toolkit"] = _after(info, "version=")
    nodes = sorted((root / "sys/devices/system/node").glob("node[0-9]*"))
    found["numa"] = {node.name: _read(node / "cpulist").strip() for node in nodes}
    if hasattr(os, "sched_getaffinity"):
        found["usable_cpus"] = len(os.sched_getaffinity(0))
    found["variables"] = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(PREFIXES)}
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _after(path: Path, before: str) -> str | None:
    for line in _read(path).splitlines():
        if line.startswith(before):
            return line.removeprefix(before).strip()
    return None


def hccl_problems(variables: Mapping[str, str], hosts: int) -> list[str]:
    """One line for each value of HCCL's variables that is known to break or to stall a run of several processes."""
    problems = []

    def number(name: str) -> int | None:
        value = variables.get(name)
        if value is not None and not re.fullmatch(r"\d+", value):
            problems.append(f"{name}={value} is no whole number of seconds or no port")
            return None
        return None if value is None else int(value)

    connect, execute, event = (number(f"HCCL_{part}_TIMEOUT") for part in ("CONNECT", "EXEC", "EVENT"))
    if connect is not None and not HCCL_LEAST_CONNECT <= connect <= HCCL_MOST_CONNECT:
        problems.append(
            f"HCCL_CONNECT_TIMEOUT={connect}: HCCL takes {HCCL_LEAST_CONNECT} to {HCCL_MOST_CONNECT} seconds"
        )
    if event is not None and (execute or 1836) >= event > 0:
        problems.append(f"HCCL_EVENT_TIMEOUT={event} must be longer than HCCL_EXEC_TIMEOUT={execute or 1836}")
    base = number("HCCL_IF_BASE_PORT")
    if base is not None and base > 65520:
        problems.append(f"HCCL_IF_BASE_PORT={base}: 16 ports from there on do not exist; take at most 65520")
    if variables.get("HCCL_WHITELIST_DISABLE") == "0" and not variables.get("HCCL_WHITELIST_FILE"):
        problems.append("HCCL_WHITELIST_DISABLE=0 without HCCL_WHITELIST_FILE lets no host connect")
    if variables.get("HCCL_INTRA_PCIE_ENABLE") == variables.get("HCCL_INTRA_ROCE_ENABLE") == "1":
        problems.append("HCCL_INTRA_PCIE_ENABLE=1 and HCCL_INTRA_ROCE_ENABLE=1 exclude each other")
    if hosts > 1 and variables.get("HCCL_SOCKET_IFNAME", "").lstrip("=") == "lo":
        problems.append("HCCL_SOCKET_IFNAME=lo reaches no other host: name the interface between the hosts")
    if variables.get("ASCEND_LAUNCH_BLOCKING") == "1":
        problems.append("ASCEND_LAUNCH_BLOCKING=1 waits for every operator; it is for finding errors")
    return problems


def private_words() -> dict[str, str]:
    """What stands for whom or where on this machine -> what to say instead; the longest first."""
    words = {str(Path.cwd()): "WORKDIR", str(Path.home()): "HOME", socket.gethostname(): "HOST"}
    with contextlib.suppress(KeyError, OSError):  # a user without a name
        words[getpass.getuser()] = "USER"
    words |= {os.environ[name]: name for name in ("USER", "LOGNAME", "HOSTNAME", "MASTER_ADDR") if os.environ.get(name)}
    return dict(sorted(words.items(), key=lambda pair: -len(pair[0])))


def without(words: Mapping[str, str], text: str) -> str:
    """`text` with every private word, home folder and address of the network replaced."""
    for word, instead in words.items():
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", instead, text)
    text = re.sub(r"/(home|Users|data/home)/[^/\s\"']+", r"/\1/USER", text)
    text = re.sub(r"\b[\w.+-]+@[\w-]+(\.[\w-]+)+\b", "ADDRESS", text)
    return re.sub(r"(?<![\d.])(?!127\.)\d{1,3}(\.\d{1,3}){3}(?![\d.])", "ADDRESS", text)
