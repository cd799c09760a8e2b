"""Which checkpoint and which device a command works with."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from groundingdino.runtime.files import open_file

if TYPE_CHECKING:
    from groundingdino.inference.predictor import Predictor

Precision = Literal["fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed"]

CHECKPOINT_PLACES = (".", "weights", "checkpoints")  # looked into where no --checkpoint is given


def regular_file(path: Path) -> Path:
    """The path. ValueError where there is no file, or what could not be read to its end, such as a pipe."""
    open_file(path).close()
    return path


def find_checkpoint(given: Path | None) -> Path:
    """The given one, or the only one near. ValueError where there are none or several."""
    if given is not None:
        return regular_file(given)
    near = sorted(path for place in CHECKPOINT_PLACES for path in Path(place).glob("*.safetensors"))
    if len(near) == 1:
        return regular_file(near[0])
    found = ", ".join(str(path) for path in near) or "none"
    raise ValueError(f"which checkpoint? Give --checkpoint PATH (found in {', '.join(CHECKPOINT_PLACES)}: {found})")


def load_predictor(
    checkpoint: Path, device: str, precision: Precision, scale: tuple[int, int] | None = None
) -> "Predictor":
    """`load_model` in a process of our own, which is tuned for the device. ValueError as there."""
    from groundingdino.inference.predictor import load_model
    from groundingdino.runtime.devices import pick_device, tune_process

    chosen = pick_device(device)
    tune_process(chosen)
    return load_model(checkpoint, str(chosen), precision, scale)
