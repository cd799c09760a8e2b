"""Which checkpoint and which device a command works with."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from groundingdino.checkpoints import zoo
from groundingdino.runtime.files import open_file

if TYPE_CHECKING:
    from groundingdino.inference.predictor import Predictor

Precision = Literal["fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed"]

MIN_SIDE, MAX_SIDE = 32, 8192  # pixels
CHECKPOINT_PLACES = (".", "weights", "checkpoints")  # looked into where no --checkpoint is given


def regular_file(path: Path) -> Path:
    """The path. ValueError where there is no file, or what could not be read to its end, such as a pipe."""
    open_file(path).close()
    return path


def is_name(given: Path) -> bool:
    """Whether it is no path but the name of a release or of a repository on the hub."""
    return not given.exists() and (str(given) in zoo.BY_NAME or zoo.is_repository(given))


@cache
def resolved(given: Path) -> Path:
    """`checkpoints.resolve`, asked once in this process: of weights of other programs the hash is taken."""
    from groundingdino import checkpoints

    return checkpoints.resolve(given)


def find_checkpoint(given: Path | None) -> Path:
    """The given one, or the only one near. ValueError where there are none or several.

    A folder of transformers and a name of `checkpoints.zoo` or the hub are handed on: `checkpoints.resolve` knows them.
    """
    if given is not None:
        return given if given.is_dir() or is_name(given) else regular_file(given)
    near = sorted(path for place in CHECKPOINT_PLACES for path in Path(place).glob("*.safetensors"))
    if len(near) == 1:
        return regular_file(near[0])
    found = ", ".join(str(path) for path in near) or "none"
    raise ValueError(f"which checkpoint? Give --checkpoint PATH (found in {', '.join(CHECKPOINT_PLACES)}: {found})")


def check_scale(scale: tuple[int, int] | None) -> None:
    """ValueError for sides that no image can be resized into, or that would take all memory."""
    if scale is not None and not MIN_SIDE <= scale[0] <= scale[1] <= MAX_SIDE:
        raise ValueError(f"--scale {scale[0]} {scale[1]}: short and long side go from {MIN_SIDE} to {MAX_SIDE} pixels")


def load_predictor(
    checkpoint: Path, device: str, precision: Precision, scale: tuple[int, int] | None = None
) -> "Predictor":
    """`load_model` in a process of our own, which is tuned for the device. ValueError as there."""
    from groundingdino.inference.predictor import load_model
    from groundingdino.runtime.devices import pick_device, tune_process

    chosen = pick_device(device)
    tune_process(chosen)
    return load_model(checkpoint, str(chosen), precision, scale)
