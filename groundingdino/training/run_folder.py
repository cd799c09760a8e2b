"""The folder of a training run: what its files are called, what a run can resume from, and its written settings."""

import fcntl
import json
import logging
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from groundingdino.runtime import environment
from groundingdino.runtime.distributed import World
from groundingdino.runtime.files import leftovers, write_text

PACKAGES = ("torch", "torchvision", "torch_npu", "timm", "tokenizers", "numpy", "pillow", "scipy", "safetensors")


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """The files of the run in `path`."""

    path: Path

    @property
    def state(self) -> Path:
        """Everything that is needed to go on."""
        return self.path / "last.state"

    @property
    def best(self) -> Path:
        """The detector with the best first evaluation figure so far."""
        return self.path / "best.safetensors"

    @property
    def final(self) -> Path:
        """The detector at the end."""
        return self.path / "final.safetensors"

    def adapter_of(self, model: Path) -> Path:
        """The adapters of `best` or `final`, of a run with adapters."""
        return model.with_name(f"{model.stem}-adapter.safetensors")

    @property
    def metrics(self) -> Path:
        """One JSON line per optimizer step and per evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        """`metrics` as a plot."""
        return self.path / "curves.png"

    @property
    def pictures(self) -> Path:
        """Predictions of the last evaluation, drawn."""
        return self.path / "pictures.png"

    @property
    def profile(self) -> Path:
        """The folder of the trace that `--profile` asks for."""
        return self.path / "profile"

    @property
    def nonfinite(self) -> Path:
        """One JSON line per process and step whose loss was not finite."""
        return self.path / "nonfinite.jsonl"

    def results(self) -> dict[str, Path]:
        """The files that a user looks for, by name, as far as they exist."""
        names = ("best", "final", "metrics", "curves", "pictures")
        files = {name: getattr(self, name) for name in names}
        files |= {f"{name} adapter": self.adapter_of(files[name]) for name in ("best", "final")}
        return {name: path for name, path in files.items() if path.exists()}

    def find_resume(self, resume: str | None) -> Path | None:
        """The state file that `--resume` means, None to start afresh.

        Args:
            resume: None (start afresh), "auto" (this folder's state, if any), a state file, or a folder with one.

        Raises:
            ValueError: the file does not exist, or this folder holds an earlier run that would be overwritten.
        """
        if resume is None and self.state.exists():
            raise ValueError(f"{self.state} exists: go on with --resume auto, or choose another folder with --run-dir")
        path = None
        if resume == "auto":
            path = self.state if self.state.exists() else None
        elif resume is not None:
            path = RunFolder(Path(resume)).state if Path(resume).is_dir() else Path(resume)
            if not path.exists():
                raise ValueError(f"nothing to resume: {path} does not exist; --resume auto starts afresh in that case")
        if path is None or path.resolve() != self.state.resolve():
            earlier = [str(file) for file in (self.state, self.best, self.final) if file.exists()]
            if earlier:
                raise ValueError(
                    f"{self.path} holds {', '.join(earlier)} of another run, which would be overwritten: "
                    "move them away, or choose another folder with --run-dir"
                )
        return path

    def remove_leftovers(self) -> None:
        """Delete what a process that was killed while it wrote a checkpoint has left."""
        models = (self.best, self.final)
        for file in (self.state, *models, *map(self.adapter_of, models)):
            for leftover in leftovers(file):
                leftover.unlink(missing_ok=True)

    def write_settings(self, config: dict[str, Any], world: World) -> None:
        """Write the resolved config as `config.json`, and what it ran on as `environment.json`."""
        for name, content in (("config.json", config), ("environment.json", describe_environment(world))):
            write_text(self.path / name, json.dumps(content, indent=1) + "\n")


class RunLock:
    """A run folder for one process alone, as long as this object is open.

    `run.lock` names host and process. The operating system gives the lock back when its owner ends, however it ends,
    so a file that a killed process left is taken over, which the log says.
    """

    def __init__(self, folder: RunFolder) -> None:
        """ValueError names the process that uses the folder."""
        self._path = folder.path / "run.lock"
        self._file = open(self._path, "a+")
        self._file.seek(0)
        before = self._file.read().strip()
        try:
            # Of this process alone: a loader worker that outlives it does not hold the lock.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._file.close()
            raise ValueError(
                f"{folder.path} is in use by {before or 'another process'}: wait for it, or choose another folder with "
                "--run-dir"
            ) from error
        except OSError as error:
            logger.warning(f"{folder.path} cannot be locked ({error.strerror}): start no second run in it")
        if before:
            logger.warning(f"taking over {folder.path} from {before}, which has ended without finishing")
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}\n")
        self._file.flush()

    def close(self) -> None:
        """Give the folder back."""
        self._path.unlink(missing_ok=True)
        self._file.close()


def describe_environment(world: World) -> dict[str, Any]:
    """Command, versions, device and revision, as plain data."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "device": _device_name(world.device),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "revision": _git_revision(Path(__file__).parent),
        **environment.describe(),
    }


def _device_name(device: torch.device) -> str:
    if device.type in ("cuda", "npu"):
        return f"{device} {torch.get_device_module(device).get_device_name(device)}"
    return f"{device} {platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _git_revision(folder: Path) -> str | None:
    """The commit that `folder` is checked out at, with "-dirty" where files differ; None outside a repository."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
