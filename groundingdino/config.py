"""Frozen dataclasses that hold every number of a model, and the named presets.

`groundingdino.model.build_detector` is the only reader of `ModelConfig`. A checkpoint stores the resolved config as
plain data, so a model is rebuilt from its file alone.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar


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
    num_denoising: int = 100  # objects an image is shown in all denoising groups together, with little noise
    max_tokens: int = 256
    box_eps: float = 1e-5  # of the inverse sigmoid in the decoder's box heads; 1e-3 in IDEA's Grounding DINO


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


def quickstart_model() -> ModelConfig:
    """Small enough to train from nothing on two CPU cores: 6.5 M parameters, two levels, images of 96 pixels."""
    return ModelConfig(
        "quickstart",
        BackboneConfig(32, (1, 1, 2), (2, 4, 8), 6, out_stages=(1, 2), drop_path_rate=0.0),
        TextConfig(width=128, num_layers=2, num_heads=4, ffn_width=256),
        width=128,
        num_levels=2,
        ffn_width=256,
        text_layer_ffn_width=256,
        fusion_width=128,
        fusion_dropout=0.0,
        enhancer_layers=2,
        decoder_layers=3,
        num_queries=20,
        num_labels=16,
        num_denoising=10,
    )


MODEL_PRESETS = {"swin_t": swin_t, "swin_b": swin_b, "swin_l": swin_l}


def model_config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Plain JSON-ready data."""
    return dataclasses.asdict(config)


def model_config_from_dict(data: Any) -> ModelConfig:
    """The inverse of `model_config_to_dict`.

    Raises:
        ValueError: names a field that this version does not know or misses, or whose value is not of its type or
            outside its range.
    """
    if not isinstance(data, dict):
        raise ValueError("not a model config: expected an object of fields")
    parts = {"backbone": _record(BackboneConfig, data.get("backbone")), "text": _record(TextConfig, data.get("text"))}
    return _record(ModelConfig, {**data, **parts})


# The least and greatest value of each size: wide of any model there is, and narrow enough to be built.
SIZE_RANGES: dict[str, tuple[int, int]] = {
    "window_size": (1, 64),
    "num_heads": (1, 128),
    "text_layer_heads": (1, 128),
    "fusion_heads": (1, 128),
    "num_levels": (1, 8),
    "num_points": (1, 64),
    "num_layers": (1, 64),
    "enhancer_layers": (1, 64),
    "decoder_layers": (1, 64),
    "depths": (1, 64),
    "out_stages": (0, 7),
    "num_denoising": (0, 100_000),
    "num_queries": (1, 100_000),
    "num_labels": (1, 100_000),
    "vocabulary": (1, 1_000_000),
    "max_positions": (1, 100_000),
    "max_tokens": (2, 100_000),
}
WIDTH_RANGE = (1, 16_384)  # of every other whole number


Record = TypeVar("Record", BackboneConfig, TextConfig, ModelConfig)


def _record(cls: type[Record], data: Any) -> Record:
    """A record from its plain fields. ValueError as `model_config_from_dict`."""
    if not isinstance(data, dict):
        raise ValueError(f"not a model config of this version of groundingdino: {cls.__name__} is no object of fields")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = [str(name) for name in data if name not in fields]
    missing = [name for name, field in fields.items() if name not in data and _has_no_default(field)]
    if unknown or missing:
        what = f"has {', '.join(unknown)}" if unknown else f"lacks {', '.join(missing)}"
        raise ValueError(f"not a model config of this version of groundingdino: {cls.__name__} {what[:200]!r}")
    return cls(**{name: _checked_value(name, str(fields[name].type), value) for name, value in data.items()})


def _has_no_default(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _checked_value(name: str, kind: str, value: Any) -> Any:
    low, high = SIZE_RANGES.get(name, WIDTH_RANGE)
    if "tuple" in kind:
        valid = isinstance(value, (list, tuple)) and 1 <= len(value) <= 8
        valid = valid and all(type(item) is int and low <= item <= high for item in value)
        expected = f"1 to 8 whole numbers from {low} to {high}"
    elif "int" in kind:
        valid, expected = type(value) is int and low <= value <= high, f"a whole number from {low} to {high}"
    elif "float" in kind:
        valid, expected = type(value) in (int, float) and 0 <= value < 1, "a number from 0 to 1"
    elif "str" in kind:
        valid, expected = isinstance(value, str) and len(value) <= 200, "a text of at most 200 characters"
    else:
        return value  # a record, checked already
    if not valid:
        raise ValueError(f"not a model config: {name} is {str(value)[:100]!r}, expected {expected}")
    return tuple(value) if "tuple" in kind else value


@dataclass(frozen=True)
class DataConfig:
    """Where the expressions and images are, and how they are read. Paths of annotations and images are below `root`."""

    root: Path = Path("refcoco")
    train_files: tuple[str, ...] = ("mdetr_annotations/finetune_refcoco_train.json",)  # MDETR json or ODVG json lines
    image_dirs: tuple[str, ...] = ("train2014",)  # folder of each training file; a single one is for all
    sampling_weights: tuple[float, ...] = (1.0,)  # times an epoch shows each entry; a single one is for all
    label_maps: tuple[str, ...] = ()  # for each training file of ODVG detection data; "" for a file of captions
    # Pairs of a split's name and its annotation file. The first one decides which checkpoint is best.
    evaluation: tuple[tuple[str, str], ...] = tuple(
        (split, f"mdetr_annotations/finetune_refcoco_{split}.json") for split in ("val", "testA", "testB")
    )
    evaluation_image_dir: str = "train2014"
    batch_size: int = 2  # images per device and micro-batch
    evaluation_batch_size: int | None = None  # sentences of one image at once; None: as suits the device
    workers: int = 4  # loader processes per device; 0 loads in the training process
    train_sides: tuple[int, ...] = tuple(range(480, 801, 32))  # pixels of the short side, one drawn per image
    train_long_side: int = 1333  # pixels, at most
    crop_probability: float = 0.5  # of a resize and crop before the resize, which may lose the object
    crop_from_sides: tuple[int, ...] = (400, 500, 600)  # pixels of the short side before the crop
    crop_sides: tuple[int, int] = (384, 600)  # pixels, the range of the crop's sides
    flip_probability: float = 0.0  # a flip swaps left and right in the sentence too
    evaluation_side: int = 800  # pixels of the short side
    evaluation_long_side: int = 1333  # pixels, at most
    on_bad_sample: Literal["stop", "skip"] = "stop"  # a missing image, a box outside it, ...


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as mmdet's RefCOCO recipe has it (lr 2e-4 for 8 devices with 4 images each)."""

    lr: float = 2e-4  # for `base_batch` images per step
    base_batch: int = 32
    scale_lr: bool = True  # multiply lr by (images per step) / base_batch
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 0.1  # largest norm of all gradients together; 0 = never clip
    # Pairs of a part of a parameter's name and a factor on lr; the longest part that matches wins. mmdet's `backbone`
    # also matches its `language_backbone`: BERT trains at 0.1 of the rate too, but not the map from its width to ours.
    lr_multipliers: tuple[tuple[str, float], ...] = (
        ("backbone", 0.1),
        ("text_encoder", 0.1),
        ("text_encoder.projection", 1.0),
    )


@dataclass(frozen=True)
class ScheduleConfig:
    """Factor on the learning rate over time."""

    kind: Literal["steps", "cosine"] = "steps"
    milestones: tuple[int, ...] = (3,)  # after this many epochs the rate drops by `gamma` (kind "steps")
    gamma: float = 0.1
    warmup_steps: int = 0  # linear from `warmup_start` to 1
    warmup_start: float = 0.1
    final: float = 0.0  # factor after the last step (kind "cosine")


@dataclass(frozen=True)
class TrainConfig:
    """Everything a training run depends on; written into the run folder as it was resolved."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run_dir: Path = Path("runs/refcoco")  # folder of checkpoints, metrics, pictures
    init_from: Path | None = None  # weights to start from: our .safetensors, or a .pth of mmdet
    epochs: int = 5  # passes over the training data
    class_weight: float = 1.0  # of the classification losses beside L1 (5) and GIoU (2); the other numbers are mmdet's
    accumulation_steps: int = 1  # micro-batches per optimizer step; their gradients are averaged
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: bool = True  # recompute most of backbone and encoder: less memory, more time
    ema_decay: float = 0.0  # per step; 0 = no moving average. Where on, the average is what is evaluated
    freeze: tuple[Literal["backbone", "text_encoder"], ...] = ()  # parts that are not trained
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, npu
    max_time: str | None = None  # such as 3h50m: end with a saved state before this much time has passed
    timeout: float = 10.0  # minutes without an answer from another process or a loader process that end the run
    resume: str | None = None  # "auto" = this run folder's last checkpoint if there is one, or a path
    save_every: int = 1000  # steps between checkpoints, besides the one after each epoch
    log_every: int = 10  # steps between reads of the losses from the device
    evaluate_every: int = 1  # epochs
    pictures: int = 4  # drawn after each evaluation
    on_nonfinite: Literal["stop", "skip"] = "stop"  # what a loss that is not finite does to the run


def refcoco() -> TrainConfig:
    """The main recipe: MM-Grounding-DINO-B on RefCOCO, for 8 devices (mmdet `refcoco/..._finetune_8xb4_5e_refcoco`)."""
    released = "weights/grounding_dino_swin-b_pretrain_obj365_goldg_v3de-f83eef00.pth"
    return TrainConfig(swin_b(), init_from=Path(released))


def quickstart() -> TrainConfig:
    """A small model that learns rendered scenes (`data.synthetic`) from fresh weights on two CPU cores."""
    data = DataConfig(
        root=Path("runs/quickstart-data"),
        evaluation=(("val", "mdetr_annotations/finetune_refcoco_val.json"),),
        batch_size=8,
        workers=1,
        train_sides=(96,),
        crop_probability=0.0,
        evaluation_side=96,
        evaluation_batch_size=4,
    )
    return TrainConfig(
        quickstart_model(),
        data,
        OptimizerConfig(lr=5e-4, scale_lr=False, betas=(0.9, 0.99), lr_multipliers=()),
        ScheduleConfig(kind="cosine", warmup_steps=50, warmup_start=0.01, final=0.02),
        run_dir=Path("runs/quickstart"),
        activation_checkpointing=False,
        epochs=2,
        class_weight=4.0,  # boxes of plain shapes are easy; which of them is meant is what has to be learned
        ema_decay=0.995,
        pictures=12,
    )


TRAIN_PRESETS = {"refcoco": refcoco, "quickstart": quickstart}


def train_config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain JSON-ready data; paths become strings."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
