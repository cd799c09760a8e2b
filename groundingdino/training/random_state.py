"""What a run folder holds, and the state of every random generator."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch

from groundingdino.runtime import devices

LAST = "last.state"  # everything needed to go on
BEST = "best.safetensors"  # the detector with the best first evaluation figure so far
FINAL = "final.safetensors"  # the detector at the end
PICTURES = "pictures.png"  # answers of the last evaluation


def find_resume(resume: str | None, run: Path) -> Path | None:
    """The state file that `--resume` means: None (start afresh), "auto" (the last one if any), a file or a folder.

    ValueError when the file does not exist, or when a run without `resume` would overwrite an earlier one.
    """
    last = run / LAST
    if resume is None:
        if last.exists():
            raise ValueError(f"{last} exists: go on with --resume auto, or choose another folder with --run-dir")
        return None
    if resume == "auto":
        return last if last.exists() else None
    path = Path(resume) / LAST if Path(resume).is_dir() else Path(resume)
    if not path.exists():
        raise ValueError(f"nothing to resume: {path} does not exist; --resume auto starts afresh in that case")
    return path


def remove_leftovers(run: Path) -> None:
    """Delete what a process that was killed while it wrote a checkpoint has left."""
    for name in (LAST, BEST, FINAL):
        for leftover in run.glob(f".{name}.*.tmp"):
            leftover.unlink(missing_ok=True)


def random_states(device: torch.device) -> dict[str, Any]:
    """The state of Python's, numpy's, torch's and the device's generators, as plain data and tensors."""
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(numpy.asarray(keys).astype("int64")), *rest],
        "torch": torch.get_rng_state(),
        "device": devices.random_state(device),
    }


def set_random_states(device: torch.device, states: dict[str, Any]) -> None:
    """The inverse of `random_states`."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(states["torch"])
    devices.set_random_state(device, states["device"])


def seed_everything(seed: int, rank: int) -> None:
    """Seed Python's, numpy's, torch's and the devices' generators, differently on each process."""
    random.seed(f"{seed}-{rank}")
    mixed = random.getrandbits(32)
    numpy.random.seed(mixed)
    torch.manual_seed(mixed)


@contextmanager
def kept_random_states(device: torch.device) -> Iterator[None]:
    """Whatever the block draws, the generators afterwards are as before: evaluations do not change a training run."""
    states = random_states(device)
    try:
        yield
    finally:
        set_random_states(device, states)
