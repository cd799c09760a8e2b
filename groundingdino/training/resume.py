"""The state of a training run: its form, and which changes of the config a resumed run may make."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from groundingdino.checkpoints import model_file, run_state
from groundingdino.config import TrainConfig, train_config_to_dict

# A saved state has these built in: shapes, which parameters are trained, the order of the samples.
FIXED = (
    "model",
    "init_from",
    "text_from",
    "freeze",
    "lora",
    "seed",
    "data.train_files",
    "data.label_maps",
    "data.sampling_weights",
)
RATES = ("model.backbone.drop_path_rate", "model.fusion_dropout")  # parts of the model that hold no weights
NOT_OF_THE_RUN = ("resume", "run_dir", "init_nonfinite")  # differ from one start to the next; changes nothing


@dataclass
class Position:
    """How far a run has come. Where the loader stands is in its own state."""

    step: int  # optimizer steps taken
    epoch: int  # epochs completed
    unevaluated: bool  # an evaluation is due before the next step
    best: float  # best deciding figure so far, -1 without any
    problems: int  # bad samples that were skipped or repaired, in this process
    stale: int = 0  # evaluations since the best one


@dataclass(frozen=True)
class LoaderState:
    """Where the training data stand, equal on every process."""

    epoch: int
    samples: int  # of this epoch, over all processes
    seed: int
    sizes: tuple[int, ...]  # entries of each training file


@dataclass(frozen=True)
class RandomState:
    """The random generators of one process, see `random_state.random_states`."""

    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[str, Tensor, int, int, float]
    torch: Tensor
    device: Tensor | None


@dataclass(frozen=True)
class TrainingState:
    """Everything that is needed to go on, as it lies in `last.state`."""

    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]  # parameter name -> AdamW's tensors; empty before the first step
    scaler: dict[str, int | float]  # of the loss scale; empty in precisions without one
    average: dict[str, Tensor] | None
    position: Position
    loader: LoaderState
    random: list[RandomState]  # one per process
    config: dict[str, Any]  # the TrainConfig that it was saved under, as plain data
    model_config: dict[str, Any]  # the model's sizes, which may come from `init_from`


def load_state(path: Path) -> TrainingState:
    """Read and check a state file. ValueError names the field that is missing or of another type."""
    raw = run_state.load_state(path)
    try:
        state = msgspec.convert(raw, TrainingState)
        json.dumps([state.config, state.model_config])  # TypeError for a tensor among the settings
        return state
    except (msgspec.ValidationError, AttributeError, TypeError) as error:  # a tensor in the place of a dict: the second
        raise ValueError(f"{path}: not a whole training state: {error}") from error


def check_fits(part: str, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError where the tensors of a part of a state have not the names and shapes of this run's."""
    problem = model_file.compare_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected)
    if problem:
        raise ValueError(f"cannot resume: the state belongs to another model: {part}: {problem}")


def changes(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """What a resumed run changes, as "optimizer.lr 0.0002 -> 0.0001".

    Raises:
        ValueError: names the changes that a resumed run cannot make.
    """
    before, after = flat(saved), flat(train_config_to_dict(config))
    changed = [name for name in after if before.get(name, after[name]) != after[name] and name not in NOT_OF_THE_RUN]
    lines = {name: f"{name.replace('_', '-')} {_shown(before[name])} -> {_shown(after[name])}" for name in changed}
    refused = [line for name, line in lines.items() if _is_fixed(name)]
    if refused:
        raise ValueError(
            f"cannot resume with {'; '.join(refused)}: the saved state depends on it; "
            "start a run of its own with another --run-dir, or take the change back"
        )
    return list(lines.values())


def _is_fixed(name: str) -> bool:
    return name not in RATES and any(name == fixed or name.startswith(f"{fixed}.") for fixed in FIXED)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as {"optimizer.lr": ...}."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + " ".join(_shown(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
