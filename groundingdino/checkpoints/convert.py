"""Files in, files out: mmdet's or transformers' MM-Grounding-DINO to ours and back, strictly and with a report."""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from groundingdino.checkpoints.formats import huggingface, mmdet
from groundingdino.checkpoints.formats.foreign_weights import ForeignWeights, read_weights
from groundingdino.checkpoints.formats.upgrade import upgrade
from groundingdino.checkpoints.messages import some
from groundingdino.checkpoints.model_file import (
    SOURCE_KEY,
    VERSION_KEY,
    checked_config,
    compare_shapes,
    detector_metadata,
    save_checkpoint,
    vocabulary_size,
)
from groundingdino.checkpoints.safetensors_file import write_tensors
from groundingdino.config import ModelConfig
from groundingdino.inputs.text import VOCABULARY_FILE
from groundingdino.runtime.files import atomic_file, atomic_folder

Target = Literal["native", "mmdet", "huggingface"]

# First eight hexadecimal digits of a released file's SHA-256, which are also the end of its name.
RELEASES = {
    "4ea751ce": "MM-GDINO-T, O365+GoldG",
    "169cc352": "MM-GDINO-T, O365+GoldG+GRIT9M",
    "e316e297": "MM-GDINO-T, O365+GoldG+V3Det",
    "b448804b": "MM-GDINO-T, O365+GoldG+GRIT9M+V3Det",
    "f83eef00": "MM-GDINO-B, O365+GoldG+V3Det",
    "f9818a7c": "MM-GDINO-B, all",
    "34dcdc53": "MM-GDINO-L, O365V2+OpenImageV6+GoldG",
    "56d69e78": "MM-GDINO-L, all",
}


@dataclass(frozen=True)
class Report:
    """What became of every tensor of a file."""

    source: ForeignWeights
    config: ModelConfig
    written: Path
    num_parameters: int
    mapped: int  # tensors that went over, under another name
    permuted: int  # of these, stored in another order
    dropped: Mapping[str, int]  # how many were left out, by reason
    added: Mapping[str, int]  # how many the target has and the source has not, by what they are
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as text."""
        return [
            f"{self.source.path}: MM-Grounding-DINO {self.config.name} in {self.source.naming} naming, "
            f"{self.num_parameters:,} parameters in {len(self.source.tensors)} tensors",
            f"  mapped   {self.mapped:5d}"
            + (
                f", of which {self.permuted} permuted (patch merging: order of the neighbours)" if self.permuted else ""
            ),
            *(f"  dropped  {count:5d}: {reason}" for reason, count in self.dropped.items()),
            *(f"  added    {count:5d}: {what}" for what, count in self.added.items()),
            *(f"  {note}" for note in (*self.source.notes, *self.warnings)),
            f"wrote {self.written}",
        ]


def convert_file(
    source: str | Path, target: str | Path, to: Target = "native", text_heads: int | None = None
) -> Report:
    """Convert a checkpoint. The target appears whole or not at all.

    Args:
        source: mmdet's .pth (released, or left by mmengine's Runner), a folder or model.safetensors of transformers'
            MMGroundingDinoForObjectDetection, or a checkpoint of ours.
        target: file to write or replace; for "huggingface" a folder to make.
        to: "native" is a safetensors file that `load_model` reads; "mmdet" is mmdet's format; "huggingface" a folder
            for transformers' `from_pretrained`.
        text_heads: attention heads of a BERT of unusual size, see `conversion.mmdet.infer_config`.

    Raises:
        ValueError: one line that says what the source is and what was expected, or which tensors do not fit.
        OSError: the target could not be written.
    """
    source, target = Path(source), Path(target)
    _check_target(source, target, to)
    opened = read_weights(source)
    if opened.naming == to:
        raise ValueError(f"{source}: in {to} format already; name the format that you want with --to")
    weights = _native_weights(opened, text_heads)
    _check_whole(opened, weights)
    write = {"native": _write_native, "mmdet": _write_mmdet, "huggingface": _write_huggingface}[to]
    provenance = _provenance(opened)
    added = write(weights, provenance, target)
    drops = {"mmdet": mmdet.dropped_because, "huggingface": huggingface.dropped_because}.get(opened.naming)
    dropped = Counter(reason for name in opened.tensors if drops and (reason := drops(name)))
    if to == "huggingface":
        dropped["denoising label embedding: transformers has no place for it"] += 1
    return Report(
        source=opened,
        config=weights.config,
        written=target,
        num_parameters=sum(tensor.numel() for tensor in weights.tensors.values()),
        mapped=len(opened.tensors) - sum(dropped.values()),
        permuted=_count_permuted(weights.tensors) if "mmdet" in (opened.naming, to) else 0,
        dropped=dropped,
        added={**weights.added, **added},
        warnings=(*_name_warning(provenance), *_number_warning(weights.tensors)),
    )


def _check_target(source: Path, target: Path, to: Target) -> None:
    """Refuse before any work what could not be written after it."""
    if not target.parent.is_dir():
        raise ValueError(f"{target} cannot be written: there is no folder {target.parent}")
    if to == "huggingface" and target.exists():
        raise ValueError(f"{target} exists; name a folder to make")
    if target.is_dir():
        raise ValueError(f"{target} is a folder; name a file to write")
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"{target} is the source itself; name another file to write")


@dataclass(frozen=True)
class _Weights:
    """A whole model under our names."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    added: Mapping[str, int]  # what the source had not, and was made up


def _native_weights(source: ForeignWeights, text_heads: int | None) -> _Weights:
    if source.naming == "native":
        config = checked_config(source.path, source.metadata)
        return _Weights(config, upgrade(source.tensors, source.metadata[VERSION_KEY]), {})
    try:
        if source.naming == "mmdet":
            config = mmdet.infer_config({name: tuple(t.shape) for name, t in source.tensors.items()}, text_heads)
            return _Weights(config, mmdet.to_native(source.tensors, config.decoder_layers), {})
        native = huggingface.to_native(source.tensors)
        native[huggingface.LABEL_EMBEDDING] = _fresh_label_embedding(native)
        config = huggingface.infer_config(native, text_heads or _text_heads(source.path.parent))
        return _Weights(config, native, {"denoising label embedding: fresh, seen in training only": 1})
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error


def _fresh_label_embedding(native: Mapping[str, Tensor]) -> Tensor:
    """As mmdet starts it; the same in every conversion."""
    width = native["level_embedding"].shape[-1] if "level_embedding" in native else 0
    return torch.randn(ModelConfig.num_labels, width, generator=torch.Generator().manual_seed(0))


def _text_heads(folder: Path) -> int | None:
    """The number of BERT's attention heads in transformers' config.json, where there is one."""
    try:
        return int(json.loads((folder / "config.json").read_text())["text_config"]["num_attention_heads"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_whole(source: ForeignWeights, weights: _Weights) -> None:
    from groundingdino.model import build_detector  # timm: not worth its seconds before the file is known to be good

    if weights.config.text.vocabulary != vocabulary_size():
        raise ValueError(
            f"{source.path}: its BERT knows {weights.config.text.vocabulary} tokens, the packaged vocabulary "
            f"(bert-base-uncased) has {vocabulary_size()}"
        )
    with torch.device("meta"):
        expected = build_detector(weights.config).state_dict()
    problem = compare_shapes(
        {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()},
        {name: tuple(tensor.shape) for name, tensor in expected.items()},
    )
    if problem:
        raise ValueError(
            f"{source.path}: not a whole MM-Grounding-DINO ({weights.config.name}), in our names: {problem}"
        )


def _provenance(source: ForeignWeights) -> dict[str, Any]:
    """Where weights come from, for the metadata of what is made of them."""
    if source.naming == "native":
        return json.loads(source.metadata.get(SOURCE_KEY, "{}"))
    digest = _sha256(source.path)
    return {
        "naming": source.naming,
        "file": source.path.name,
        "sha256": digest,
        "release": RELEASES.get(digest[:8]),
        "position_ids": mmdet.POSITION_IDS in source.tensors,
    }


def _write_native(weights: _Weights, provenance: dict[str, Any], target: Path) -> dict[str, int]:
    metadata = {**detector_metadata(weights.config), SOURCE_KEY: json.dumps(provenance)}
    save_checkpoint(target, weights.tensors, metadata)
    return {}


def _write_mmdet(weights: _Weights, provenance: dict[str, Any], target: Path) -> dict[str, int]:
    theirs = mmdet.to_mmdet(weights.tensors, weights.config.decoder_layers)
    buffers = mmdet.mmdet_buffers(weights.config)
    if provenance.get("position_ids"):
        buffers[mmdet.POSITION_IDS] = torch.arange(weights.config.text.max_positions)[None]
    with atomic_file(target) as file:
        torch.save({"meta": {"source": provenance}, "state_dict": {**theirs, **buffers}}, file)
    return {"buffers that mmdet stores": len(buffers)}


def _write_huggingface(weights: _Weights, _provenance: dict[str, Any], target: Path) -> dict[str, int]:
    """model.safetensors, config.json, and what AutoProcessor needs."""
    files = huggingface.settings(weights.config)
    state = huggingface.to_huggingface(weights.tensors, weights.config)
    with atomic_folder(target) as folder:
        write_tensors(folder / "model.safetensors", state, {"format": "pt"})
        shutil.copyfile(VOCABULARY_FILE, folder / "vocab.txt")
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return {"relative position indices that transformers stores": sum(weights.config.backbone.depths)}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _count_permuted(native: Mapping[str, Tensor]) -> int:
    """Patch merging goes by the same names in mmdet and here."""
    return sum(mmdet.PERMUTED.fullmatch(name) is not None for name in native)


def _name_warning(provenance: Mapping[str, Any]) -> list[str]:
    """mmdet ends a released file's name with the beginning of its SHA-256."""
    promised = re.search(r"-([0-9a-f]{8})\.pth$", provenance.get("file", ""))
    if promised is None or provenance["sha256"].startswith(promised[1]):
        return []
    found = provenance["sha256"][:8]
    return [f"warning: its name promises a SHA-256 of {promised[1]}..., it is {found}...: altered or damaged"]


def _number_warning(tensors: Mapping[str, Tensor]) -> list[str]:
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    return [f"warning: {len(bad)} tensors hold values that are not finite: {some(bad)}"] if bad else []
