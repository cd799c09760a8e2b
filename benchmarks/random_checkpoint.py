"""A full-size MM-Grounding-DINO checkpoint with random weights, in mmdet's format and naming.

    python -m benchmarks random_checkpoint swin_b random_swin_b_mmdet.pth

Released weights cannot always be had; this file is as large, has the same names, and exercises the same path.
"""

import math
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from groundingdino.checkpoints.formats import mmdet
from groundingdino.config import MODEL_PRESETS, ModelConfig
from groundingdino.model import GroundingDINO, build_detector


def random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Values of a plausible scale: norms near 1, biases near 0, matrices that keep a signal's size."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return noise * (1 / math.sqrt(shape[1:].numel()))
    is_scale = name.endswith("norm.weight") or ".norm" in name and name.endswith(".weight")
    return 1 + 0.02 * noise if is_scale else 0.02 * noise


def random_model(config: ModelConfig, seed: int = 0) -> GroundingDINO:
    """A detector with random weights. Sampling offsets keep mmcv's fan of directions, heads bias -4.6."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = build_detector(config).eval()
    for name, tensor in model.state_dict().items():
        if "sampling_offsets.bias" not in name and "contrastive_head" not in name:
            tensor.copy_(random_tensor(name, tensor.shape, generator))
    return model


def random_checkpoint(size: str, path: Path, seed: int = 0) -> int:
    """Write it; returns the number of parameters."""
    config = MODEL_PRESETS[size]()
    weights = random_model(config, seed).state_dict()
    state = mmdet.to_mmdet(weights) | mmdet.mmdet_buffers(config)
    torch.save({"meta": {"random": True, "seed": seed}, "state_dict": state}, path)
    return sum(tensor.numel() for tensor in weights.values())


def main(
    size: Annotated[Literal["swin_t", "swin_b", "swin_l"], tyro.conf.Positional],
    path: Annotated[Path, tyro.conf.Positional],
    /,
    seed: int = 0,
) -> None:
    """Write a random checkpoint of a released size, as mmdet would."""
    print(f"wrote {path}: {random_checkpoint(size, path, seed):,} random parameters")


if __name__ == "__main__":
    tyro.cli(main)
