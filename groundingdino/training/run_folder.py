"""The folder of a training run: what its files are called, what a run can resume from, and its written settings."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from groundingdino.runtime.distributed import World
from groundingdino.runtime.files import leftovers, write_text

PACKAGES = ("torch", "torchvision", "torch_npu", "timm", "tokenizers", "numpy", "pillow", "scipy", "safetensors")


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
    def nonfinite(self) -> Path:
        """One JSON line per process and step whose loss was not finite."""
        return self.path / "nonfinite.jsonl"

    def results(self) -> dict[str, Path]:
        """The files that a user looks for, by name, as far as they exist."""
        names = ("best", "final", "metrics", "curves", "pictures")
        return {name: getattr(self, name) for name in names if getattr(self, name).exists()}

    def find_resume(self, resume: str | None) -> Path | None:
        """The state file that `--resume` means, None to start afresh.

        Args:
            resume: None (start afresh), "auto" (this folder's state, if any), a state file, or a folder with one.

        Raises:
            ValueError: the file does not exist, or this folder holds an earlier run that would be overwritten.
        """
        if resume is None:
            if self.state.exists():
                raise ValueError(
                    f"{self.state} exists: go on with --resume auto, or choose another folder with --run-dir"
                )
            return None
        if resume == "auto":
            return self.state if self.state.exists() else None
        given = Path(resume)
        path = RunFolder(given).state if given.is_dir() else given
        if not path.exists():
            raise ValueError(f"nothing to resume: {path} does not exist; --resume auto starts afresh in that case")
        return path

    def remove_leftovers(self) -> None:
        """Delete what a process that was killed while it wrote a checkpoint has left."""
        for file in (self.state, self.best, self.final):
            for leftover in leftovers(file):
                leftover.unlink(missing_ok=True)

    def write_settings(self, config: dict[str, Any], world: World) -> None:
        """Write the resolved config as `config.json`, and what it ran on as `environment.json`."""
        for name, content in (("config.json", config), ("environment.json", describe_environment(world))):
            write_text(self.path / name, json.dumps(content, indent=1) + "\n")


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
