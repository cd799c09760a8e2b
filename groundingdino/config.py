"""Frozen dataclasses that hold every number of a model, and the named presets.

`groundingdino.model.build_detector` is the only reader of `ModelConfig`. A checkpoint stores the resolved config as
plain data, so a model is rebuilt from its file alone.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class BackboneConfig:
    """Swin Transformer (Liu et al. 2021) as mmdet builds it."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int
    out_stages: tuple[int, ...] = (1, 2, 3)
    drop_path_rate: float = 0.3


@dataclass(frozen=True)
class TextConfig:
    """BERT encoder; the defaults are bert-base-uncased."""

    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_width: int = 3072
    vocabulary: int = 30522
    max_positions: int = 512


@dataclass(frozen=True)
class ModelConfig:
    """Grounding DINO; the defaults are what all released MM-Grounding-DINO sizes share."""

    name: str
    backbone: BackboneConfig
    text: TextConfig = field(default_factory=TextConfig)
    width: int = 256
    num_heads: int = 8
    num_levels: int = 4
    num_points: int = 4
    ffn_width: int = 2048
    text_layer_heads: int = 4
    text_layer_ffn_width: int = 1024
    fusion_width: int = 1024
    fusion_heads: int = 4
    fusion_dropout: float = 0.1
    enhancer_layers: int = 6
    decoder_layers: int = 6
    num_queries: int = 900
    num_labels: int = 256  # rows of the denoising label embedding
    max_tokens: int = 256


def swin_t() -> ModelConfig:
    """MM-Grounding-DINO Swin-T, 173 M parameters."""
    return ModelConfig("swin_t", BackboneConfig(96, (2, 2, 6, 2), (3, 6, 12, 24), 7, drop_path_rate=0.2))


def swin_b() -> ModelConfig:
    """MM-Grounding-DINO Swin-B, 233 M parameters."""
    return ModelConfig("swin_b", BackboneConfig(128, (2, 2, 18, 2), (4, 8, 16, 32), 12))


def swin_l() -> ModelConfig:
    """MM-Grounding-DINO Swin-L with five levels, 343 M parameters."""
    backbone = BackboneConfig(192, (2, 2, 18, 2), (6, 12, 24, 48), 12, out_stages=(0, 1, 2, 3), drop_path_rate=0.2)
    return ModelConfig("swin_l", backbone, num_levels=5)


MODEL_PRESETS = {"swin_t": swin_t, "swin_b": swin_b, "swin_l": swin_l}


def model_config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Plain JSON-ready data."""
    return dataclasses.asdict(config)


def model_config_from_dict(data: dict[str, Any]) -> ModelConfig:
    """The inverse of `model_config_to_dict`. ValueError names a field that this version does not know or misses."""
    try:
        backbone = {k: tuple(v) if isinstance(v, list) else v for k, v in data["backbone"].items()}
        return ModelConfig(**{**data, "backbone": BackboneConfig(**backbone), "text": TextConfig(**data["text"])})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a model config of this version of groundingdino: {error}") from error
