"""Open a file of weights from elsewhere and say whose it is."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from groundingdino.checkpoints.formats.pytorch_file import Inert, read_pytorch_file
from groundingdino.checkpoints.messages import some
from groundingdino.checkpoints.safetensors_file import TensorFile
from groundingdino.runtime.files import open_file

EXPECTED = "expected an MM-Grounding-DINO checkpoint: mmdet's .pth, transformers' model.safetensors, or ours"
CONTAINERS = ("state_dict", "model")  # where mmengine, and IDEA and DETR, keep the weights in what they save
NATIVE_CONFIG = "groundingdino.config"

# Names that tell a model, most telling first: (what it is, all of these patterns occur, none of these do).
FAMILIES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (
        "IDEA's GroundingDINO (its head has no bias and no 1/sqrt(D) and shares one box head: other weights, "
        "not convertible into MM-Grounding-DINO)",
        (r"bert\.", r"transformer\.level_embed"),
        (),
    ),
    (
        "IDEA's GroundingDINO in transformers' naming (GroundingDinoForObjectDetection; its head has no bias: "
        "not convertible into MM-Grounding-DINO)",
        (r"model\.backbone\.conv_encoder\.", r"model\.text_backbone\."),
        (r"(model\.decoder\.)?class_embed\.0\.bias",),
    ),
    (
        "the GroundingDINO of mmdet's configs/grounding_dino (a head with a learnable scale or without bias: "
        "not convertible into MM-Grounding-DINO)",
        (r"encoder\.fusion_layers\.", r"bbox_head\.cls_branches\.0\.log_scale"),
        (),
    ),
    (
        "the GroundingDINO of mmdet's configs/grounding_dino (a head without bias: not convertible into "
        "MM-Grounding-DINO)",
        (r"encoder\.fusion_layers\.", r"bbox_head\.reg_branches\."),
        (r"bbox_head\.cls_branches\.0\.bias",),
    ),
    ("GLIP of mmdet", (r"language_model\.", r"bbox_head\."), (r"encoder\.fusion_layers\.",)),
    ("an mmdet detector without a language model", (r"backbone\.", r"bbox_head\."), (r"language_model\.",)),
    ("a plain BERT", (r"(bert\.)?embeddings\.word_embeddings\.weight",), (r"transformer\.level_embed",)),
    ("a ResNet", (r"(backbone\.)?layer1\.0\.conv1\.weight",), ()),
    ("a Swin Transformer without a detector", (r"(backbone\.)?patch_embed\.",), (r"bbox_head\.", r"encoder\.")),
)
MMDET = ("mmdet", (r"encoder\.fusion_layers\.", r"bbox_head\.cls_branches\.0\.bias", r"language_model\."))
TRANSFORMERS = ("huggingface", (r"model\.backbone\.conv_encoder\.", r"(model\.decoder\.)?class_embed\.0\.bias"))


@dataclass(frozen=True)
class ForeignWeights:
    """Weights as they lie in a file."""

    path: Path
    naming: str  # "mmdet", "huggingface" or "native"
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a safetensors file
    notes: tuple[str, ...] = ()  # what else was in the file and is not used, one line each


def read_weights(path: Path) -> ForeignWeights:
    """Open a .pth or .safetensors file, or a folder of a transformers model.

    Raises:
        ValueError: one line that says what was found and what was expected.
    """
    if path.is_dir() and (path / "model.safetensors").exists():
        path = path / "model.safetensors"
    try:
        return _read_safetensors(path) if _is_safetensors(path) else _read_pytorch(path)
    except ValueError as error:
        raise ValueError(f"{error}; {EXPECTED}") from error


def _is_safetensors(path: Path) -> bool:
    with open_file(path) as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{" and start[5:8] == b"\0\0\0")


def _read_safetensors(path: Path) -> ForeignWeights:
    with TensorFile(path) as file:
        naming = "native" if NATIVE_CONFIG in file.metadata else naming_of(file.entries, path)
        return ForeignWeights(path, naming, {name: file.read(name) for name in file.entries}, file.metadata)


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
            raise ValueError(f"{path}: {name!r} among its weights is a {kind}, not a tensor")
        if name in tensors:
            raise ValueError(f"{path}: holds {name!r} both with and without the prefix 'module.'")
        tensors[name] = value
    return ForeignWeights(path, naming_of(tensors, path), tensors, notes=tuple(notes))


def _state_dict(content: Any, path: Path) -> tuple[dict[Any, Any], list[str]]:
    if isinstance(content, Inert):
        raise ValueError(f"{path}: a whole pickled {content.name}, not a dict of tensors")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a pickled {type(content).__name__}, not a dict of tensors")
    for container in CONTAINERS:
        if isinstance(content.get(container), dict):
            others = [repr(key) for key in content if key not in (container, "meta")]
            return content[container], [f"not read: {some(others, 20)}"] if others else []
    return content, []


def naming_of(names: Collection[str], path: Path) -> str:
    """ "mmdet" or "huggingface", for names of MM-Grounding-DINO. ValueError tells what else the names look like."""

    def occur(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in names)

    for naming, needed in (MMDET, TRANSFORMERS):
        if all(map(occur, needed)) and not occur(r"bbox_head\.cls_branches\.0\.log_scale"):
            return naming
    for family, present, absent in FAMILIES:
        if all(map(occur, present)) and not any(map(occur, absent)):
            raise ValueError(f"{path}: {family}")
    raise ValueError(f"{path}: an unknown model of {len(names)} tensors ({some(sorted(names)) or 'none'})")
