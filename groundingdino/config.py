"""Frozen dataclasses that hold every number of a model, and the named presets.

`groundingdino.model.build_detector` is the only reader of `ModelConfig`. A checkpoint stores the resolved config as
plain data, so a model is rebuilt from its file alone.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

# Ranges of a model's sizes: wide for anything that could be trained, narrow enough that no file asks for a galaxy.
Count = Annotated[int, msgspec.Meta(ge=1, le=100)]  # layers, heads, levels, points
Width = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
Entries = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]  # queries, tokens, words
NonNegative = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
Rate = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Pixels = Annotated[int, msgspec.Meta(ge=1, le=100_000)]
Sides = Annotated[tuple[Pixels, ...], msgspec.Meta(min_length=1)]
Workers = Annotated[int, msgspec.Meta(ge=0, le=1000)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e9)]
NotNegative = Annotated[float, msgspec.Meta(ge=0, lt=1e9)]
Each = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]  # every so many
Rank = Annotated[int, msgspec.Meta(ge=0, le=4096)]
Part = Literal[
    "backbone", "text_encoder", "text_encoder.embeddings", "text_encoder.layers", "feature_enhancer", "decoder"
]  # of a model
Stages = Annotated[tuple[Count, ...], msgspec.Meta(min_length=1, max_length=8)]


@dataclass(frozen=True)
class BackboneConfig:
    """Swin Transformer (Liu et al. 2021) as mmdet builds it."""

    embed_dim: Width
    depths: Stages
    num_heads: Stages
    window_size: Count
    out_stages: tuple[Annotated[int, msgspec.Meta(ge=0, lt=8)], ...] = (1, 2, 3)
    drop_path_rate: Rate = 0.3


@dataclass(frozen=True)
class TextConfig:
    """BERT encoder; the defaults are bert-base-uncased."""

    width: Width = 768
    num_layers: Count = 12
    num_heads: Count = 12
    ffn_width: Width = 3072
    vocabulary: Entries = 30522
    max_positions: Entries = 512


@dataclass(frozen=True)
class ModelConfig:
    """Grounding DINO; the defaults are what all released MM-Grounding-DINO sizes share."""

    name: Annotated[str, msgspec.Meta(max_length=200)]
    backbone: BackboneConfig
    text: TextConfig = field(default_factory=TextConfig)
    width: Width = 256
    num_heads: Count = 8
    num_levels: Count = 4
    num_points: Count = 4
    ffn_width: Width = 2048
    text_layer_heads: Count = 4
    text_layer_ffn_width: Width = 1024
    fusion_width: Width = 1024
    fusion_heads: Count = 4
    fusion_dropout: Rate = 0.1
    enhancer_layers: Count = 6
    decoder_layers: Count = 6
    num_queries: Entries = 900
    num_labels: Entries = 256  # rows of the denoising label embedding
    num_denoising: NonNegative = 100  # objects an image is shown in all denoising groups together, with little noise
    max_tokens: Entries = 256
    # Of the inverse sigmoid in the decoder's box heads; 1e-3 in IDEA's Grounding DINO.
    box_eps: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-5
    # Whether each head multiplies its logits by the exponential of a learned number; mmdet's COCO fine-tunes of IDEA's
    # weights do.
    learned_scale: bool = False


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


def small_model() -> ModelConfig:
    """Small enough to learn one's own data from nothing on two CPU cores: images of about 320 pixels, two levels."""
    return dataclasses.replace(
        quickstart_model(),
        name="small",
        backbone=BackboneConfig(32, (1, 1, 3), (2, 4, 8), 6, out_stages=(2,), drop_path_rate=0.0),
        num_queries=100,
        num_labels=256,
        num_denoising=50,
    )


NORM_GROUPS = 16  # of the neck's group norms, where the width is no multiple of 32
MODEL_PRESETS = {"swin_t": swin_t, "swin_b": swin_b, "swin_l": swin_l}


def model_config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Plain JSON-ready data."""
    return dataclasses.asdict(config)


def model_config_from_dict(data: Any) -> ModelConfig:
    """The inverse of `model_config_to_dict`.

    ValueError names a field that is missing, unknown to this version, of another type, out of its range, or at odds
    with another one.
    """
    try:
        config = msgspec.convert(data, ModelConfig)
    except msgspec.ValidationError as error:
        raise ValueError(f"not a model config of this version of groundingdino: {error}") from error
    known = model_config_to_dict(config)
    for found, expected in (
        (data, known),
        (data["backbone"], known["backbone"]),
        (data.get("text", {}), known["text"]),
    ):
        unknown = sorted(map(str, found.keys() - expected.keys()))
        if unknown:
            raise ValueError(f"not a model config of this version of groundingdino: unknown {', '.join(unknown)[:200]}")
    problem = _contradiction(config)
    if problem is not None:
        raise ValueError(f"a model config at odds with itself: {problem}")
    return config


def _contradiction(config: ModelConfig) -> str | None:
    """The first two fields that do not go together; None without any."""
    backbone, text = config.backbone, config.text
    stages = len(backbone.depths)
    if len(backbone.num_heads) != stages:
        return f"backbone.depths has {stages} entries, backbone.num_heads {len(backbone.num_heads)}"
    if not backbone.out_stages or list(backbone.out_stages) != sorted({n for n in backbone.out_stages if n < stages}):
        return f"backbone.out_stages {list(backbone.out_stages)} are not ascending stages below {stages}"
    if len(backbone.out_stages) > config.num_levels:
        return f"backbone.out_stages has {len(backbone.out_stages)} entries for num_levels {config.num_levels}"
    divisions = [
        ("width", config.width, "num_heads", config.num_heads),
        ("fusion_width", config.fusion_width, "fusion_heads", config.fusion_heads),
        ("width", config.width, "text_layer_heads", config.text_layer_heads),
        ("width", config.width, "the groups of the neck's norms,", NORM_GROUPS),
        ("text.width", text.width, "text.num_heads", text.num_heads),
        *(
            (f"backbone.embed_dim * {2**n}", backbone.embed_dim * 2**n, f"backbone.num_heads[{n}]", heads)
            for n, heads in enumerate(backbone.num_heads)
        ),
    ]
    for whole, size, part, heads in divisions:
        if size % heads:
            return f"{whole} {size} is no multiple of {part} {heads}"
    return None


@dataclass(frozen=True)
class DataConfig:
    """Where the expressions and images are, and how they are read. Paths of annotations and images are below `root`."""

    root: Path = Path("refcoco")
    train_files: tuple[str, ...] = ("mdetr_annotations/finetune_refcoco_train.json",)  # MDETR json or ODVG json lines
    image_dirs: tuple[str, ...] = ("train2014",)  # folder of each training file; a single one is for all
    sampling_weights: tuple[NotNegative, ...] = (1.0,)  # times an epoch shows each entry; a single one is for all
    label_maps: tuple[str, ...] = ()  # for each training file of ODVG detection data; "" for a file of captions
    # Images of categories that fewer than this share of the images have are shown more often; 0: all alike.
    repeat_threshold: Share = 0.0
    # Pairs of a split's name and its annotation file. The first one decides which checkpoint is best.
    evaluation: tuple[tuple[str, str], ...] = tuple(
        (split, f"mdetr_annotations/finetune_refcoco_{split}.json") for split in ("val", "testA", "testB")
    )
    evaluation_image_dirs: tuple[str, ...] = ("train2014",)  # folder of each split; a single one is for all
    allow_outside: bool = False  # accept file names that are absolute or leave the image folder by ".."
    batch_size: Entries = 2  # images per device and micro-batch
    evaluation_batch_size: Entries | None = None  # sentences of one image at once; None: as suits the device
    workers: Workers = 4  # loader processes per device; 0 loads in the training process
    train_sides: Sides = tuple(range(480, 801, 32))  # pixels of the short side, one drawn per image
    train_long_side: Pixels = 1333  # pixels, at most
    crop_probability: Share = 0.5  # of a resize and crop before the resize, which may lose the object
    crop_from_sides: Sides = (
        400,
        500,
        600,
    )  # pixels of the short side before the crop
    crop_sides: tuple[Pixels, Pixels] = (384, 600)  # pixels, the range of the crop's sides
    size_buckets: NonNegative = 0  # pad batches to at most so many shapes; 0 = to their largest image, as mmdet does
    flip_probability: Share = 0.0  # a flip swaps left and right in the sentence too
    vertical_flip_probability: Share = 0.0  # for images without an up and down, such as micrographs; not for captions
    evaluation_side: Pixels = 800  # pixels of the short side
    evaluation_long_side: Pixels = 1333  # pixels, at most
    on_bad_sample: Literal["stop", "skip"] = "stop"  # a missing image, a box outside it, ...


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as mmdet's RefCOCO recipe has it (lr 2e-4 for 8 devices with 4 images each)."""

    lr: NotNegative = 2e-4  # for `base_batch` images per step
    base_batch: Entries = 32
    scale_lr: bool = True  # multiply lr by (images per step) / base_batch
    weight_decay: NotNegative = 1e-4
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    clip_norm: NotNegative = 0.1  # largest norm of all gradients together; 0 = never clip
    # Pairs of a part of a parameter's name and a factor on lr; the longest part that matches wins. mmdet's `backbone`
    # also matches its `language_backbone`: BERT trains at 0.1 of the rate too, but not the map from its width to ours.
    lr_multipliers: tuple[tuple[str, NotNegative], ...] = (
        ("backbone", 0.1),
        ("text_encoder", 0.1),
        ("text_encoder.projection", 1.0),
    )


@dataclass(frozen=True)
class ScheduleConfig:
    """Factor on the learning rate over time."""

    kind: Literal["steps", "cosine"] = "steps"
    milestones: tuple[int, ...] = (3,)  # after this many epochs the rate drops by `gamma` (kind "steps")
    gamma: Share = 0.1
    warmup_steps: NonNegative = 0  # linear from `warmup_start` to 1
    warmup_start: Share = 0.1
    final: Share = 0.0  # factor after the last step (kind "cosine")


@dataclass(frozen=True)
class TrainConfig:
    """Everything a training run depends on; written into the run folder as it was resolved."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run_dir: Path = Path("runs/refcoco")  # folder of checkpoints, metrics, pictures
    init_from: Path | None = None  # weights to start from: our .safetensors, or a .pth of mmdet
    init_nonfinite: bool = False  # start from weights that are NaN or infinite, too
    epochs: Entries = 5  # passes over the training data
    class_weight: NotNegative = 1.0  # of the classification losses beside L1 (5) and GIoU (2)
    accumulation_steps: Entries = 1  # micro-batches per optimizer step; their gradients are averaged
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    exchange_precision: Literal["fp32", "bf16"] = "fp32"  # of gradients between processes; bf16 halves the bytes
    bucket_mib: Positive = 25.0  # MiB of gradients that are exchanged together, while the rest is still computed
    activation_checkpointing: bool = True  # recompute most of backbone and encoder: less memory, more time
    ema_decay: Rate = 0.0  # per step; 0 = no moving average. Where on, the average is what is evaluated
    freeze: tuple[Part, ...] = ()  # parts that are not trained
    lora: Rank = 0  # of low-rank adapters, trained instead of the weights in all parts but `freeze`; 0 = none
    text_from: Path | None = None  # folder of a BERT (transformers' layout) for the text encoder of a fresh model
    seed: int = 0
    deterministic: bool = False  # the same numbers in every run on this kind of device; slower, see `runtime.devices`
    device: str = "auto"  # auto, cpu, cuda, npu
    max_time: str | None = None  # such as 3h50m: end with a saved state before this much time has passed
    timeout: Positive = 10.0  # minutes without an answer from another process or a loader process that end the run
    resume: str | None = None  # "auto" = this run folder's last checkpoint if there is one, or a path
    save_every: Each = 1000  # steps between checkpoints, besides the one after each epoch
    log: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)  # beside metrics.jsonl
    profile: str | None = None  # steps to trace, such as 10:13 for 10, 11 and 12; the longest operators are printed
    log_every: Each = 10  # steps between reads of the losses from the device
    evaluate_every: Each = 1  # epochs
    early_stopping: NonNegative = 0  # evaluations in a row without a better figure that end the run; 0 = never
    pictures: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 4  # drawn after each evaluation
    on_nonfinite: Literal["stop", "skip"] = "stop"  # what a loss that is not finite does to the run


def check_train_config(config: TrainConfig) -> None:
    """ValueError in one line that names the first field of another type or out of its range."""
    try:
        msgspec.convert(dataclasses.asdict(config), TrainConfig)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$.")
        raise ValueError(f"{place.rstrip('`') or 'config'}: {message[0].lower()}{message[1:]}") from error
    model_config_from_dict(model_config_to_dict(config.model))


def with_settings(config: Any, settings: Mapping[str, Any]) -> Any:
    """The config with some fields replaced, named as on the command line: {"data.batch_size": 8, "epochs": 20}.

    ValueError names a field that does not exist.
    """
    for name, value in settings.items():
        first, _, rest = name.replace("-", "_").partition(".")
        known = [f.name for f in dataclasses.fields(config)]
        if first not in known:
            raise ValueError(f"no setting {name}; there are {', '.join(known)}")
        new = with_settings(getattr(config, first), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{first: new})
    return config


def train_config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain JSON-ready data; paths become strings."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
