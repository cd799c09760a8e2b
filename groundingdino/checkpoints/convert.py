"""Weights in, weights out: IDEA's, mmdet's and transformers' to ours and back, strictly and with a report."""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from groundingdino.checkpoints import zoo
from groundingdino.checkpoints.adapter import identity
from groundingdino.checkpoints.formats import huggingface, idea, mmdet, original_head
from groundingdino.checkpoints.formats.foreign_weights import ForeignWeights, read_weights
from groundingdino.checkpoints.formats.key_table import check_types
from groundingdino.checkpoints.formats.original_head import LABEL_EMBEDDING
from groundingdino.checkpoints.formats.upgrade import upgrade
from groundingdino.checkpoints.model_file import (
    SOURCE_KEY,
    VERSION_KEY,
    checked_config,
    compare_shapes,
    detector_metadata,
    save_checkpoint,
    stored_source,
    vocabulary_size,
)
from groundingdino.checkpoints.safetensors_file import write_tensors
from groundingdino.config import ModelConfig, model_config_from_dict, model_config_to_dict
from groundingdino.inputs.text import VOCABULARY_FILE
from groundingdino.runtime.files import atomic_file, atomic_folder, open_file
from groundingdino.runtime.messages import some

if TYPE_CHECKING:
    from groundingdino.model import GroundingDINO

Target = Literal["native", "mmdet", "huggingface", "idea"]
FRESH = "denoising label embedding: fresh, seen in training only"
NO_PLACE = "denoising label embedding: no place for it"
TABLES = {"mmdet": mmdet.TABLE, "huggingface": huggingface.TABLE, "idea": idea.TABLE}


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
        permuted = f", of which {self.permuted} permuted (patch merging: order of the neighbours)"
        return [
            f"{self.source.path}: Grounding DINO {self.config.name} in {self.source.naming} naming, "
            f"{self.num_parameters:,} parameters in {len(self.source.tensors)} tensors",
            f"  mapped   {self.mapped:5d}" + (permuted if self.permuted else ""),
            *(f"  dropped  {count:5d}: {reason}" for reason, count in self.dropped.items()),
            *(f"  added    {count:5d}: {what}" for what, count in self.added.items()),
            *(f"  {note}" for note in (*self.source.notes, *self.warnings)),
            f"wrote {self.written}",
        ]


def convert_file(
    source: str | Path, target: str | Path, to: Target = "native", text_heads: int | None = None, hub: str = ""
) -> Report:
    """Convert a checkpoint. The target appears whole or not at all.

    Args:
        source: IDEA's .pth, mmdet's .pth (released, or left by mmengine's Runner), a folder or model.safetensors of
            transformers' GroundingDinoForObjectDetection or MMGroundingDinoForObjectDetection, or a checkpoint of ours.
        target: file to write or replace; for "huggingface" a folder to make.
        to: "native" is a safetensors file that `load_model` reads; "mmdet" and "idea" are their formats; "huggingface"
            is a folder for transformers' `from_pretrained`.
        text_heads: attention heads of a BERT of unusual size, see `mmdet.infer_config`.
        hub: the repository of the Hugging Face hub that `source` was downloaded from, for the record.

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
    provenance = _provenance(opened, weights, hub)
    added = WRITERS[to](weights, provenance, target)
    table = TABLES.get(opened.naming)
    dropped = Counter(reason for name in opened.tensors if table and (reason := table.dropped_because(name)))
    mapped = len(opened.tensors) - dropped.total()
    if to in ("huggingface", "idea"):
        dropped[NO_PLACE] += 1
        mapped -= FRESH not in weights.added
    return Report(
        source=opened,
        config=weights.config,
        written=target,
        num_parameters=sum(tensor.numel() for tensor in weights.tensors.values()),
        mapped=mapped,
        permuted=_count_permuted(weights.tensors) if "mmdet" in (opened.naming, to) else 0,
        dropped=dropped,
        added={**weights.added, **added},
        warnings=(*_name_warning(provenance), *_number_warning(weights.tensors)),
    )


def read_detector(source: Path, device: str | torch.device = "cpu") -> "GroundingDINO":
    """The detector of other programs' weights, in eval mode and float32, converted in memory: nothing is written.

    ValueError as `convert_file`; also for weights that are not finite.
    """
    from groundingdino.model import build_detector

    opened = read_weights(source)
    weights = _native_weights(opened, None)
    _check_whole(opened, weights)
    for problem in _number_warning(weights.tensors):
        raise ValueError(f"{source}: {problem.removeprefix('warning: ')}")
    with torch.device("meta"):
        model = build_detector(weights.config)
    # A copy: tensors of a file may share their bytes, and parameters must not.
    tensors = {name: tensor.to(device, torch.float32, copy=True) for name, tensor in weights.tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


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
class NativeWeights:
    """A whole model under our names."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    added: Mapping[str, int] = field(default_factory=dict)  # what the source had not, and was made up


def _native_weights(source: ForeignWeights, text_heads: int | None) -> NativeWeights:
    if source.naming == "native":
        config = checked_config(source.path, source.metadata)
        return NativeWeights(config, upgrade(source.tensors, source.metadata[VERSION_KEY]))
    try:
        if source.naming == "mmdet":
            native = mmdet.to_native(source.tensors)
        else:
            native = (idea if source.naming == "idea" else huggingface).to_native(source.tensors)
        biased = any(map(original_head.BIAS.fullmatch, native))
        original = not biased or any(name.endswith("log_scale") for name in native)
        if original:
            native = original_head.from_original(native)
        added = {} if biased else {"head without bias, written as one with biases of zero": 1}
        if LABEL_EMBEDDING not in native and (original or source.naming != "mmdet"):
            native[LABEL_EMBEDDING] = _fresh_label_embedding(native)
            added[FRESH] = 1
        config = huggingface.infer_config(native, text_heads or _text_heads(source.files[0].parent))
        if original and source.naming != "mmdet":  # mmdet runs IDEA's weights with its own eps
            config = replace(config, box_eps=original_head.IDEA_EPS)
        return NativeWeights(model_config_from_dict(model_config_to_dict(config)), native, added)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error


def _fresh_label_embedding(native: Mapping[str, Tensor]) -> Tensor:
    """As mmdet starts it; the same in every conversion."""
    levels = native.get("level_embedding")
    width = levels.shape[-1:].numel() if levels is not None else 0
    return torch.randn(ModelConfig.num_labels, width, generator=torch.Generator().manual_seed(0))


def _text_heads(folder: Path) -> int | None:
    """The number of BERT's attention heads in transformers' config.json, where there is one."""
    try:
        with open_file(folder / "config.json") as file:
            heads = json.loads(file.read(1_000_000))["text_config"]["num_attention_heads"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return heads if type(heads) is int and heads > 0 else None


def _check_whole(source: ForeignWeights, weights: NativeWeights) -> None:
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
        raise ValueError(f"{source.path}: not a whole Grounding DINO ({weights.config.name}), in our names: {problem}")
    try:
        check_types(weights.tensors)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error


def tensor_digest(native: Mapping[str, Tensor]) -> str:
    """`identity` of a model's weights in our naming: the same for copies in any format that keeps float32.

    The denoising label embedding, which transformers and IDEA do not keep, does not count.
    """
    return identity({name: tensor for name, tensor in native.items() if name != LABEL_EMBEDDING})


def _provenance(source: ForeignWeights, weights: NativeWeights, hub: str) -> dict[str, Any]:
    """Where weights come from, for the metadata of what is made of them."""
    if source.naming == "native":
        return stored_source(source.path, source.metadata)
    sha256, tensors = file_digest(source.files), tensor_digest(weights.tensors)
    release = zoo.identify(sha256, hub, tensors)
    return {
        "naming": source.naming,
        "file": source.path.name,
        "sha256": sha256,
        "tensors": tensors,
        "hub": hub or None,
        "release": release and release.title,
        "position_ids": mmdet.POSITION_IDS in source.tensors,
    }


def file_digest(files: tuple[Path, ...]) -> str:
    """SHA-256 of a file; of several, of all their bytes one after another."""
    digest = hashlib.sha256()
    for path in files:
        with open_file(path) as file:
            while data := file.read(2**22):
                digest.update(data)
    return digest.hexdigest()


def _write_native(weights: NativeWeights, provenance: dict[str, Any], target: Path) -> dict[str, int]:
    metadata = {**detector_metadata(weights.config), SOURCE_KEY: json.dumps(provenance)}
    save_checkpoint(target, weights.tensors, metadata)
    return {}


def _write_mmdet(weights: NativeWeights, provenance: dict[str, Any], target: Path) -> dict[str, int]:
    native = original_head.unscaled(weights.tensors) if weights.config.learned_scale else weights.tensors
    theirs = mmdet.to_mmdet(native, weights.config.decoder_layers)
    buffers = mmdet.mmdet_buffers(weights.config)
    if provenance.get("position_ids"):
        buffers[mmdet.POSITION_IDS] = torch.arange(weights.config.text.max_positions)[None]
    with atomic_file(target) as file:
        torch.save({"meta": {"source": provenance}, "state_dict": {**theirs, **buffers}}, file)
    return {"buffers that mmdet stores": len(buffers)}


def _write_idea(weights: NativeWeights, _provenance: dict[str, Any], target: Path) -> dict[str, int]:
    theirs = idea.to_idea(weights.tensors, weights.config)
    with atomic_file(target) as file:
        torch.save({"model": {f"module.{name}": tensor for name, tensor in theirs.items()}}, file)
    return {
        "relative position indices that IDEA stores": sum(weights.config.backbone.depths),
        "BERT's pooler, which IDEA stores and does not use: zeros": 2,
    }


def _write_huggingface(weights: NativeWeights, _provenance: dict[str, Any], target: Path) -> dict[str, int]:
    """model.safetensors, config.json, and what AutoProcessor needs, in the class that has the weights' head."""
    original = original_head.is_original(weights.config) and original_head.has_original_head(weights.tensors)
    files = huggingface.settings(weights.config, original)
    native = original_head.to_original(weights.tensors) if original else weights.tensors
    state = huggingface.to_huggingface(native, weights.config)
    if original:
        state = {name: t for name, t in state.items() if not re.match(r"bbox_embed\.[1-9]", name)}  # all are the same
    with atomic_folder(target) as folder:
        write_tensors(folder / "model.safetensors", state, {"format": "pt"})
        shutil.copyfile(VOCABULARY_FILE, folder / "vocab.txt")
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return {"relative position indices that transformers stores": sum(weights.config.backbone.depths)}


WRITERS: dict[Target, Callable[[NativeWeights, dict[str, Any], Path], dict[str, int]]] = {
    "native": _write_native,
    "mmdet": _write_mmdet,
    "huggingface": _write_huggingface,
    "idea": _write_idea,
}


def _count_permuted(native: Mapping[str, Tensor]) -> int:
    """Patch merging goes by the same names in mmdet and here."""
    return sum(mmdet.PERMUTED.fullmatch(name) is not None for name in native)


def _name_warning(provenance: Mapping[str, Any]) -> list[str]:
    """mmdet ends a released file's name with the beginning of its SHA-256."""
    promised = re.search(r"-([0-9a-f]{8})\.pth$", str(provenance.get("file")))
    if promised is None or str(provenance.get("sha256")).startswith(promised[1]):
        return []
    found = str(provenance.get("sha256"))[:8]
    return [f"warning: its name promises a SHA-256 of {promised[1]}..., it is {found}...: altered or damaged"]


def _number_warning(tensors: Mapping[str, Tensor]) -> list[str]:
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    return [f"warning: {len(bad)} tensors hold values that are not finite: {some(bad)}"] if bad else []
