"""A model's checkpoint: one safetensors file, from which alone it is rebuilt. Its metadata keys are below."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import Tensor

from groundingdino.checkpoints.adapter import ADAPTER_KEY
from groundingdino.checkpoints.formats.upgrade import stored_names
from groundingdino.checkpoints.run_state import STATE_KEY
from groundingdino.checkpoints.safetensors_file import TensorFile, write_tensors
from groundingdino.config import ModelConfig, Pixels, model_config_from_dict, model_config_to_dict
from groundingdino.inputs.text import VOCABULARY_FILE
from groundingdino.runtime.messages import brief, some

if TYPE_CHECKING:
    from groundingdino.model.detector import GroundingDINO

CONFIG_KEY = "groundingdino.config"  # JSON of model_config_to_dict
VOCABULARY_KEY = "groundingdino.vocabulary"  # SHA-256 of the vocabulary file, hexadecimal
SOURCE_KEY = "groundingdino.source"  # JSON: where the weights come from, see conversion
SCALE_KEY = (
    "groundingdino.scale"  # JSON [short side, long side]: pixels of the images it was trained for; may be absent
)
VERSION_KEY = "groundingdino.version"
VERSION = "2"
READABLE_VERSIONS = ("1", "2")  # see formats.upgrade

CONVERT = "python convert_checkpoint.py {path} OUT.safetensors"


@cache
def vocabulary_identity() -> str:
    """SHA-256 of the packaged vocabulary, the one that every model of ours is used with."""
    return hashlib.sha256(VOCABULARY_FILE.read_bytes()).hexdigest()


@cache
def vocabulary_size() -> int:
    """Number of tokens in the packaged vocabulary."""
    return len(VOCABULARY_FILE.read_text(encoding="utf-8").splitlines())


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and text metadata atomically: afterwards `path` is the new file or, on an error, still the old one.

    Raises:
        OSError: full disk, no permission, no such folder; says that the old file is intact.
    """
    write_tensors(path, tensors, metadata)


def detector_metadata(config: ModelConfig) -> dict[str, str]:
    """The metadata that `load_detector` needs."""
    return {
        VERSION_KEY: VERSION,
        CONFIG_KEY: json.dumps(model_config_to_dict(config)),
        VOCABULARY_KEY: vocabulary_identity(),
    }


def save_detector(path: str | Path, model: "GroundingDINO", extra_metadata: Mapping[str, str] | None = None) -> None:
    """Write a model with everything that `load_detector` needs, its adapters merged.

    `extra_metadata` is kept beside it.
    """
    from groundingdino.model.lora import merged_state  # timm: too slow to import for the other functions here

    save_checkpoint(path, merged_state(model), {**(extra_metadata or {}), **detector_metadata(model.config)})


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of a checkpoint of ours. ValueError says what the file is where it is not one."""
    with _open(path) as file:
        return file.metadata


def load_detector(
    path: str | Path, device: str | torch.device = "cpu", allow_nonfinite: bool = False
) -> "GroundingDINO":
    """Rebuild a model from its file alone, in eval mode and float32.

    The tensors are read straight into the memory that the model keeps: no second copy.

    Args:
        allow_nonfinite: take weights that are NaN or infinite, too.
    Raises:
        ValueError: one line that says what the file is and what to do: missing, truncated, another program's, saved
            by a later version or for another vocabulary, with tensors that do not fit its config, or not finite.
    """
    from groundingdino.model.detector import build_detector  # timm: too slow to import for the other functions here

    with _open(path) as file:
        config = checked_config(file.path, file.metadata)
        with torch.device("meta"):
            model = build_detector(config)
        stored = stored_names(file.entries, file.metadata[VERSION_KEY])
        shapes = {name: _joined_shape([file.entries[part].shape for part in parts]) for name, parts in stored.items()}
        problem = compare_shapes(shapes, {name: tuple(t.shape) for name, t in model.state_dict().items()})
        if problem:
            raise ValueError(f"{path}: its tensors do not fit its config {config.name!r}: {problem}")
        wrong = [f"{name} {entry.dtype}" for name, entry in file.entries.items() if not entry.dtype.is_floating_point]
        if wrong:
            raise ValueError(f"{path}: {len(wrong)} weights are not floating-point numbers: {some(wrong)}")
        tensors = {}
        for name, parts in stored.items():
            tensor = file.read(parts[0]) if len(parts) == 1 else torch.cat([file.read(part) for part in parts])
            if not allow_nonfinite and not _is_finite(tensor):
                raise ValueError(
                    f"{path}: not finite: {name!r} holds NaN or infinity, so its predictions mean nothing "
                    "(load_model(..., allow_nonfinite=True) and training with --init-nonfinite take it all the same)"
                )
            tensors[name] = tensor.to(device, torch.float32)
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


def _is_finite(tensor: Tensor) -> bool:
    """Read once, without a copy: the least and the greatest are NaN where any value is."""
    return tensor.numel() == 0 or all(map(math.isfinite, torch.aminmax(tensor)))


def _joined_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Of tensors that are joined along the first axis."""
    if len(shapes) == 1:
        return shapes[0]
    return (sum(shape[0] for shape in shapes if shape), *shapes[0][1:])


def compare_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """One line about names that are missing, unexpected or of another shape; empty where there are none."""
    wrong = [f"{k} {found[k]} instead of {expected[k]}" for k in expected if k in found and found[k] != expected[k]]
    parts = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": wrong,
    }
    return "; ".join(f"{len(names)} {kind} ({some(names)})" for kind, names in parts.items() if names)


def _open(path: str | Path) -> TensorFile:
    if Path(path).is_file():
        with open(path, "rb") as stream:
            start = stream.read(4)
        if start[:2] in (b"PK", b"\x80\x02"):
            raise ValueError(f"{path}: a PyTorch file, e.g. mmdet's; convert it first: {CONVERT.format(path=path)}")
    file = TensorFile(path)
    if CONFIG_KEY in file.metadata:
        return file
    with file:
        if STATE_KEY in file.metadata:
            raise ValueError(f"{path}: the state of a training run, not a model; use the model saved beside it")
        if ADAPTER_KEY in file.metadata:
            raise ValueError(
                f"{path}: an adapter, not a model; merge it first: groundingdino merge BASE {path} OUT.safetensors"
            )
        raise ValueError(
            f"{path}: safetensors of another program ({len(file.entries)} tensors: {some(file.entries, 2)}); "
            f"if it is MM-Grounding-DINO, convert it first: {CONVERT.format(path=path)}"
        )


def checked_config(path: Path, metadata: Mapping[str, str]) -> ModelConfig:
    """The model config in a checkpoint's metadata. ValueError: another version or vocabulary than this package's."""
    version = metadata.get(VERSION_KEY)
    if version not in READABLE_VERSIONS:
        readable = " and ".join(READABLE_VERSIONS)
        found = brief(str(version))
        raise ValueError(f"{path}: checkpoint of version {found}, this groundingdino reads {readable}: upgrade it")
    if metadata.get(VOCABULARY_KEY) != vocabulary_identity():
        found = brief(str(metadata.get(VOCABULARY_KEY)))
        raise ValueError(
            f"{path}: trained with another vocabulary (SHA-256 {found}) than the packaged "
            f"bert-base-uncased ({vocabulary_identity()}); its token ids would mean other words"
        )
    try:
        return model_config_from_dict(json.loads(metadata[CONFIG_KEY]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a model config ({brief(str(error))})") from error


def stored_source(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a checkpoint's metadata says about where its weights come from; empty where it does not say.

    Raises:
        ValueError: names the file, where that is no JSON object.
    """
    return _parsed(path, metadata, SOURCE_KEY, "{}", dict[str, Any])


def stored_config(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The config in a checkpoint's metadata, not checked; see `checked_config`. ValueError for no JSON object."""
    return _parsed(path, metadata, CONFIG_KEY, "null", dict[str, Any])


def image_scale(path: str | Path, default: tuple[int, int]) -> tuple[int, int]:
    """Most pixels of an image's short and long side that a checkpoint was trained for; `default` where it does not say.

    Raises:
        ValueError: as `read_metadata`, and where it says something else.
    """
    return _parsed(path, read_metadata(path), SCALE_KEY, json.dumps(default), tuple[Pixels, Pixels])


def _parsed(path: str | Path, metadata: Mapping[str, str], key: str, default: str, form: Any) -> Any:
    try:
        return msgspec.convert(json.loads(metadata.get(key, default)), form)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged metadata {key!r} ({brief(str(error))})") from error
