"""Files in, files out: mmdet's or transformers' MM-Grounding-DINO to ours and back, strictly and with a report."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from groundingdino.checkpoint import (
    SOURCE_KEY,
    checked_config,
    compare_shapes,
    detector_metadata,
    save_checkpoint,
    vocabulary_size,
)
from groundingdino.config import ModelConfig
from groundingdino.conversion import mmdet
from groundingdino.conversion.key_table import some
from groundingdino.conversion.source import Source, read_source
from groundingdino.tensor_files import atomic_file

Target = Literal["native", "mmdet"]

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

    source: Source
    config: ModelConfig
    written: Path
    num_parameters: int
    mapped: int  # tensors that went over, under another name
    permuted: int  # of these, stored in another order
    dropped: Mapping[str, int]  # how many were left out, by reason
    added: int  # buffers that the target has and the source has not, computed
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as text."""
        return [
            f"{self.source.path}: MM-Grounding-DINO {self.config.name} in {self.source.naming} naming, "
            f"{self.num_parameters:,} parameters in {len(self.source.tensors)} tensors",
            f"  mapped   {self.mapped:5d}, of which {self.permuted} permuted (patch merging: order of the neighbours)",
            *(f"  dropped  {count:5d}: {reason}" for reason, count in self.dropped.items()),
            *([f"  computed {self.added:5d} buffers that mmdet stores"] if self.added else []),
            *(f"  {note}" for note in (*self.source.notes, *self.warnings)),
            f"wrote {self.written} ({self.written.stat().st_size / 1e6:,.1f} MB)",
        ]


def convert_file(
    source: str | Path, target: str | Path, to: Target = "native", text_heads: int | None = None
) -> Report:
    """Convert a checkpoint. The target file appears whole or not at all.

    Args:
        source: mmdet's .pth (released, or left by mmengine's Runner), or a checkpoint of ours.
        target: file to write or replace.
        to: "native" is a safetensors file that `load_model` reads; "mmdet" is mmdet's format.
        text_heads: attention heads of a BERT of unusual size, see `conversion.mmdet.infer_config`.

    Raises:
        ValueError: one line that says what the source is and what was expected, or which tensors do not fit.
        OSError: the target could not be written.
    """
    source, target = Path(source), Path(target)
    if target.is_dir() or not target.parent.is_dir():
        problem = "is a folder" if target.is_dir() else f"cannot be written: there is no folder {target.parent}"
        raise ValueError(f"{target} {problem}; name a file to write")
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"{target} is the source itself; name another file to write")
    opened = read_source(source)
    config, native = _native_weights(opened, text_heads)
    _check(opened, config, native)
    if to == "mmdet":
        return _write_mmdet(opened, config, native, target)
    return _write_native(opened, config, native, target)


def _native_weights(source: Source, text_heads: int | None) -> tuple[ModelConfig, dict[str, Tensor]]:
    try:
        if source.naming == "native":
            return checked_config(source.path, source.metadata), dict(source.tensors)
        config = mmdet.infer_config({name: tuple(t.shape) for name, t in source.tensors.items()}, text_heads)
        return config, mmdet.to_native(source.tensors, config.decoder_layers)
    except ValueError as error:
        raise ValueError(
            f"{source.path}: {error}".replace(f"{source.path}: {source.path}", str(source.path))
        ) from error


def _check(source: Source, config: ModelConfig, native: Mapping[str, Tensor]) -> None:
    from groundingdino.model import build_detector  # timm: not worth its seconds before the file is known to be good

    with torch.device("meta"):
        expected = build_detector(config).state_dict()
    problem = compare_shapes(
        {name: tuple(tensor.shape) for name, tensor in native.items()},
        {name: tuple(tensor.shape) for name, tensor in expected.items()},
    )
    if problem:
        raise ValueError(f"{source.path}: not a whole MM-Grounding-DINO ({config.name}), in our names: {problem}")


def _write_native(source: Source, config: ModelConfig, native: Mapping[str, Tensor], target: Path) -> Report:
    if source.naming == "native":
        raise ValueError(f"{source.path}: already in our format; to convert it to another, name that with --to")
    if config.text.vocabulary != vocabulary_size():
        raise ValueError(
            f"{source.path}: its BERT knows {config.text.vocabulary} tokens, the packaged vocabulary "
            f"(bert-base-uncased) has {vocabulary_size()}"
        )
    digest = _sha256(source.path)
    provenance = {
        "naming": source.naming,
        "file": source.path.name,
        "sha256": digest,
        "release": RELEASES.get(digest[:8]),
        "position_ids": mmdet.POSITION_IDS in source.tensors,
    }
    save_checkpoint(target, native, {**detector_metadata(config), SOURCE_KEY: json.dumps(provenance)})
    dropped = Counter(reason for name in source.tensors if (reason := mmdet.dropped_because(name)))
    permuted = sum(mmdet.PERMUTED.fullmatch(name) is not None for name in source.tensors)
    warnings = (*_name_warning(source.path, digest), *_number_warning(native))
    return Report(source, config, target, _count(native), len(native), permuted, dropped, 0, warnings)


def _write_mmdet(source: Source, config: ModelConfig, native: Mapping[str, Tensor], target: Path) -> Report:
    theirs = mmdet.to_mmdet(native, config.decoder_layers)
    buffers = mmdet.mmdet_buffers(config)
    provenance = json.loads(source.metadata.get(SOURCE_KEY, "{}"))
    if provenance.get("position_ids"):
        buffers[mmdet.POSITION_IDS] = torch.arange(config.text.max_positions)[None]
    with atomic_file(target) as file:
        torch.save({"meta": {"source": provenance}, "state_dict": {**theirs, **buffers}}, file)
    permuted = sum(mmdet.PERMUTED.fullmatch(name) is not None for name in theirs)
    return Report(source, config, target, _count(native), len(native), permuted, {}, len(buffers))


def _count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name_warning(path: Path, digest: str) -> list[str]:
    """mmdet ends a released file's name with the beginning of its SHA-256."""
    promised = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if promised is None or promised[1] == digest[:8]:
        return []
    return [f"warning: its name promises a SHA-256 of {promised[1]}..., it is {digest[:8]}...: altered or damaged"]


def _number_warning(tensors: Mapping[str, Tensor]) -> list[str]:
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    return [f"warning: {len(bad)} tensors hold values that are not finite: {some(bad)}"] if bad else []
