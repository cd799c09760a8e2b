"""Averages of checkpoints of one model: between a pre-trained and a fine-tuned one they keep what both know.

Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT) and "Model soups".
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundingdino.checkpoints.adapter import merge_adapters
from groundingdino.checkpoints.model_file import (
    SCALE_KEY,
    SOURCE_KEY,
    compare_shapes,
    load_detector,
    read_metadata,
    save_detector,
    stored_source,
)


def merge(checkpoints: Sequence[Path], target: Path, weights: Sequence[float]) -> None:
    """Write the weighted mean of checkpoints of ours, which keeps where each came from.

    Args:
        checkpoints: two or more of one model's sizes; rates of dropout may differ, the first one's are kept.
        weights: of each; they sum to 1.
    Raises:
        ValueError: not of one size, too few, or weights that do not sum to 1. OSError: the target cannot be written.
    """
    if len(checkpoints) < 2:
        raise ValueError("name two checkpoints or more to merge")
    if len(weights) != len(checkpoints) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"{len(checkpoints)} checkpoints with weights {list(weights)}: give one each, summing to 1")
    merged = load_detector(checkpoints[0])
    total = {name: tensor * weights[0] for name, tensor in merged.state_dict().items()}
    for path, weight in zip(checkpoints[1:], weights[1:], strict=True):
        other = load_detector(path).state_dict()
        if {k: v.shape for k, v in other.items()} != {k: v.shape for k, v in total.items()}:
            raise ValueError(f"{path} is of another size than {checkpoints[0]}: only checkpoints of one model merge")
        for name, tensor in other.items():
            total[name] += tensor * weight
    merged.load_state_dict(total)
    found = [read_metadata(path) for path in checkpoints]
    parts = [
        {"file": path.name, "weight": weight, "source": stored_source(path, metadata)}
        for path, weight, metadata in zip(checkpoints, weights, found, strict=True)
    ]
    metadata = {SOURCE_KEY: json.dumps({"merged": parts})}
    if SCALE_KEY in found[0]:
        metadata[SCALE_KEY] = found[0][SCALE_KEY]
    save_detector(target, merged, metadata)


def interpolate(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """`alpha` of one state and the rest of another, exact at both ends. ValueError for models of two sizes."""
    problem = compare_shapes(
        {k: tuple(v.shape) for k, v in tuned.items()}, {k: tuple(v.shape) for k, v in base.items()}
    )
    if problem:
        raise ValueError(f"only checkpoints of one model can be mixed: {problem}")
    return {name: torch.lerp(base[name], tuned[name], alpha) for name in base}


def merge_adapter_files(base: Path, adapters: Sequence[Path], target: Path, weight: float = 1.0) -> None:
    """Write `base` with `weight` times the sum of adapters that were trained on it.

    Raises:
        ValueError: a file that is no adapter, or one of another model. OSError: the target cannot be written.
    """
    model = load_detector(base)
    merge_adapters(model, adapters, weight)
    metadata = read_metadata(base)
    parts: list[dict[str, Any]] = [{"file": base.name, "source": stored_source(base, metadata)}]
    parts += [{"adapter": path.name, "weight": weight} for path in adapters]
    kept = {SCALE_KEY: metadata[SCALE_KEY]} if SCALE_KEY in metadata else {}
    save_detector(target, model, {**kept, SOURCE_KEY: json.dumps({"merged": parts})})
