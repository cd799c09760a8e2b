"""Adapters (`model.lora`) as files of a few megabytes, and the check that they meet the model they were trained on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from torch import Tensor, nn

from groundingdino.checkpoints.formats.foreign_weights import is_safetensors
from groundingdino.checkpoints.safetensors_file import TensorFile, write_tensors
from groundingdino.runtime.messages import brief, some

if TYPE_CHECKING:
    from groundingdino.model.detector import GroundingDINO

ADAPTER_KEY = "groundingdino.adapter"  # JSON of `AdapterOrigin`
KINDS = {".a", ".b"}  # ends of the tensors' names


@dataclass(frozen=True)
class AdapterOrigin:
    """How an adapter was made."""

    rank: int
    parts: tuple[str, ...]  # of the model, that have adapters
    base: str  # `identity` of the model without it
    base_name: str  # as the user named it
    version: int = 1


def identity(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a model's weights, whatever file they came from: names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach().float().cpu().contiguous()
        digest.update(f"{name} {list(values.shape)}\n".encode())
        digest.update(values.reshape(-1).numpy().data)
    return digest.hexdigest()


def save_adapter(path: Path, model: nn.Module, origin: AdapterOrigin, extra_metadata: Mapping[str, str]) -> None:
    """Write the adapters of a model, atomically; `extra_metadata` is kept beside them."""
    from groundingdino.model import lora  # timm: too slow to import for `is_adapter`

    metadata = {**extra_metadata, ADAPTER_KEY: json.dumps(asdict(origin))}
    write_tensors(path, lora.adapter_state(model), metadata)


def is_adapter(path: Path) -> bool:
    """Whether something is the file of an adapter."""
    if not path.is_file() or not is_safetensors(path):
        return False
    with TensorFile(path) as file:
        return ADAPTER_KEY in file.metadata


def read_adapter(path: Path) -> tuple[AdapterOrigin, dict[str, Tensor]]:
    """How an adapter was made, and its `lora.adapter_state`. ValueError names a file that is something else."""
    with TensorFile(path) as file:
        if ADAPTER_KEY not in file.metadata:
            raise ValueError(f"{path}: not an adapter ({len(file.entries)} tensors: {some(file.entries, 2)})")
        try:
            origin = msgspec.json.decode(file.metadata[ADAPTER_KEY], type=AdapterOrigin)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}: not an adapter of this version ({brief(str(error))})") from error
        if origin.version != 1:
            raise ValueError(f"{path}: an adapter of version {origin.version}, this groundingdino reads 1: upgrade it")
        return origin, {name: file.read(name) for name in file.entries}


def merge_adapters(model: "GroundingDINO", paths: Sequence[Path], weight: float = 1.0) -> None:
    """Add adapters to the weights of a float32 model on the CPU, which is then as fast as it was before.

    Args:
        model: the one that all of them were trained on.
        paths: adapter files; their changes add up.
        weight: of each change; 0 leaves the model as it is.
    Raises:
        ValueError: a file is no adapter, is damaged, or was trained on another model.
    """
    from groundingdino.model import lora

    state = model.state_dict()
    own = identity(state)
    for path in paths:
        origin, adapter = read_adapter(path)
        if origin.base != own:
            raise ValueError(
                f"{path}: an adapter of another model: trained on {brief(origin.base_name)} with weights "
                f"{brief(origin.base[:12])}, these are {own[:12]}"
            )
        _check(path, adapter, state)
        state = lora.merge_adapter(state, adapter, weight)
    model.load_state_dict(state)


def _check(path: Path, adapter: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """ValueError where tensors do not belong to a matrix of the model."""
    names = {name[:-2] for name in adapter}
    if adapter.keys() != {name + kind for name in names for kind in KINDS} or not names <= state.keys():
        raise ValueError(f"{path}: a damaged adapter: its tensors have no matrix in the model, or no partner")
    for name in sorted(names):
        a, b, matrix = adapter[f"{name}.a"], adapter[f"{name}.b"], state[name]
        fits = a.dim() == b.dim() == 3 and a.shape[1] == b.shape[2] and len(a) == len(b)
        if not fits or (b.shape[0] * b.shape[1], a.shape[2]) != matrix.shape:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise ValueError(f"{path}: a damaged adapter: {shapes} for {name!r} of {tuple(matrix.shape)}")
        if not (a.dtype.is_floating_point and a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"{path}: not finite: the adapter of {name!r}")
