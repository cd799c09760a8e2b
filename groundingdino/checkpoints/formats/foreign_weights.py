"""Open weights from elsewhere, a file or a folder, and say whose they are."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from groundingdino.checkpoints.formats.pytorch_file import Inert, read_pytorch_file
from groundingdino.checkpoints.safetensors_file import TensorFile
from groundingdino.runtime.files import open_file
from groundingdino.runtime.messages import brief, some

EXPECTED = (
    "expected Grounding DINO weights: IDEA's or mmdet's .pth, transformers' folder or model.safetensors, or a "
    "checkpoint of groundingdino"
)
CONTAINERS = ("state_dict", "model")  # where mmengine, and IDEA and DETR, keep the weights in what they save
NATIVE_CONFIG = "groundingdino.config"
WHOLE, SHARDS, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"  # of transformers
INDEX_LIMIT = 10_000_000  # bytes
LONGEST_NAME = 255  # characters of a file's name

# Names that tell a model of Grounding DINO's architecture: all of these patterns occur.
NAMINGS: dict[str, tuple[str, ...]] = {
    "mmdet": (r"encoder\.fusion_layers\.", r"bbox_head\.reg_branches\.", r"language_model\."),
    "huggingface": (r"model\.backbone\.conv_encoder\.", r"model\.text_backbone\."),
    "idea": (r"bert\.", r"transformer\.level_embed"),
}
# Names that tell other models, most telling first: (what it is, all of these patterns occur, none of these do).
FAMILIES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("GLIP of mmdet", (r"language_model\.", r"bbox_head\."), (r"encoder\.fusion_layers\.",)),
    ("an mmdet detector without a language model", (r"backbone\.", r"bbox_head\."), (r"language_model\.",)),
    ("a plain BERT", (r"(bert\.)?embeddings\.word_embeddings\.weight",), (r"transformer\.level_embed",)),
    ("a ResNet", (r"(backbone\.)?layer1\.0\.conv1\.weight",), ()),
    ("a Swin Transformer without a detector", (r"(backbone\.)?patch_embed\.",), (r"bbox_head\.", r"encoder\.")),
)


@dataclass(frozen=True)
class ForeignWeights:
    """Weights as they lie in a file or folder."""

    path: Path
    naming: str  # "mmdet", "huggingface", "idea" or "native"
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]  # that hold the tensors
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a safetensors file
    notes: tuple[str, ...] = ()  # what else was in the file and is not used, one line each


def read_weights(path: Path) -> ForeignWeights:
    """Open a .pth or .safetensors file, or a folder of a transformers model, in one file or several.

    Raises:
        ValueError: one line that says what was found and what was expected.
    """
    try:
        files = weight_files(path)
        if len(files) > 1:
            return _read_shards(path, files)
        return _read_safetensors(files[0]) if is_safetensors(files[0]) else _read_pytorch(files[0])
    except ValueError as error:
        raise ValueError(f"{error}; {EXPECTED}") from error


def weight_files(path: Path) -> tuple[Path, ...]:
    """The files with weights that a path means: itself, or those in a folder of transformers."""
    if path.name == SHARDS:
        path = path.parent
    if not path.is_dir():
        return (path,)
    if (path / WHOLE).exists():
        return (path / WHOLE,)
    if (path / SHARDS).exists():
        return _shards(path / SHARDS)
    if (path / PICKLED).exists():
        return (path / PICKLED,)
    raise ValueError(f"{path}: a folder without {WHOLE}, {SHARDS} or {PICKLED}")


def _shards(index: Path) -> tuple[Path, ...]:
    with open_file(index) as file:
        content = file.read(INDEX_LIMIT)
    try:
        names = set(json.loads(content)["weight_map"].values())
        if not names or not all(isinstance(name, str) and _is_plain(name) for name in names):
            raise ValueError("a shard that is not a file beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: not the index of a model in several files ({brief(repr(error))})") from error
    return tuple(index.parent / name for name in sorted(names))


def _is_plain(name: str) -> bool:
    return Path(name).name == name and name.isprintable() and len(name) <= LONGEST_NAME


def is_safetensors(path: Path) -> bool:
    """Whether a file is one of safetensors, by its name or its beginning. ValueError where it cannot be opened."""
    with open_file(path) as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{" and start[5:8] == b"\0\0\0")


def _read_safetensors(path: Path) -> ForeignWeights:
    with TensorFile(path) as file:
        naming = "native" if NATIVE_CONFIG in file.metadata else naming_of(file.entries, path)
        return ForeignWeights(path, naming, {name: file.read(name) for name in file.entries}, (path,), file.metadata)


def _read_shards(path: Path, files: tuple[Path, ...]) -> ForeignWeights:
    tensors: dict[str, Tensor] = {}
    for shard in files:
        with TensorFile(shard) as file:
            twice = [name for name in file.entries if name in tensors]
            if twice:
                raise ValueError(f"{shard}: holds {some(twice)}, which another shard holds too")
            tensors |= {name: file.read(name) for name in file.entries}
    return ForeignWeights(path, naming_of(tensors, path), tensors, files)


def _read_pytorch(path: Path) -> ForeignWeights:
    file = read_pytorch_file(path)
    state, notes = _state_dict(file.content, path)
    if file.inert:
        notes.append(f"never loaded or run: {some(file.inert, 20)}")
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        name = str(key).removeprefix("module.")
        if not isinstance(value, Tensor):
            kind = value.name if isinstance(value, Inert) else type(value).__name__
            raise ValueError(f"{path}: {brief(name)!r} among its weights is a {brief(kind)}, not a tensor")
        if name in tensors:
            raise ValueError(f"{path}: holds {brief(name)!r} both with and without the prefix 'module.'")
        tensors[name] = value
    claimed, size = sum(t.numel() * t.element_size() for t in tensors.values()), path.stat().st_size
    if claimed > 2 * size:  # a few tensors share their bytes, as IDEA's box heads do
        raise ValueError(f"{path}: {claimed} bytes of tensors in a file of {size}: damaged or made to fill the memory")
    return ForeignWeights(path, naming_of(tensors, path), tensors, (path,), notes=tuple(notes))


def _state_dict(content: Any, path: Path) -> tuple[dict[Any, Any], list[str]]:
    if isinstance(content, Inert):
        raise ValueError(f"{path}: a whole pickled {brief(content.name)}, not a dict of tensors")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a pickled {type(content).__name__}, not a dict of tensors")
    for container in CONTAINERS:
        if isinstance(content.get(container), dict):
            others = [repr(key) for key in content if key not in (container, "meta")]
            return content[container], [f"not read: {some(others, 20)}"] if others else []
    return content, []


def naming_of(names: Collection[str], path: Path) -> str:
    """A key of NAMINGS, for names of Grounding DINO. ValueError tells what else the names look like."""

    def occur(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in names)

    for naming, needed in NAMINGS.items():
        if all(map(occur, needed)):
            return naming
    for family, present, absent in FAMILIES:
        if all(map(occur, present)) and not any(map(occur, absent)):
            raise ValueError(f"{path}: {family}")
    raise ValueError(f"{path}: an unknown model of {len(names)} tensors ({some(sorted(names)) or 'none'})")
