"""From a config to what a run starts with: weights and data."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from groundingdino.checkpoints import model_file
from groundingdino.checkpoints.bert import read_bert
from groundingdino.checkpoints.hub import resolve
from groundingdino.config import DataConfig, ModelConfig, TrainConfig, model_config_from_dict, model_config_to_dict
from groundingdino.data import (
    Augmentation,
    GroundingDataset,
    LoaderOptions,
    Padding,
    SampleLimits,
    TrainingSource,
    TrainLoader,
    affordable_workers,
    build_train_loader,
    load_training,
    padding_for,
)
from groundingdino.data.formats.record import ReadOptions
from groundingdino.model import GroundingDINO, build_detector
from groundingdino.runtime import devices
from groundingdino.runtime.distributed import World

BYTES_PER_PIXEL = 3 * 4 + 1  # three float32 channels and whether it is real

logger = logging.getLogger(__name__)


def initial_model(config: TrainConfig) -> GroundingDINO:
    """The model a new run starts with: `config.init_from`'s weights and sizes, or fresh ones of `config.model`, with
    the BERT of `config.text_from`.

    Drop path and dropout always come from `config`. Other programs' weights are converted first, into the cache, once.
    ValueError in one line for weights that are missing or of another model.
    """
    if config.init_from is None:
        return _fresh_model(config)
    loaded = model_file.load_detector(_initial_checkpoint(config.init_from), allow_nonfinite=config.init_nonfinite)
    model = build_detector(with_rates(loaded.config, config.model))
    model.load_state_dict(loaded.state_dict())
    return model


def _fresh_model(config: TrainConfig) -> GroundingDINO:
    if config.text_from is None:
        return build_detector(config.model)
    text, weights = read_bert(config.text_from)
    try:
        sizes = model_config_from_dict(model_config_to_dict(dataclasses.replace(config.model, text=text)))
    except ValueError as error:
        raise ValueError(f"{config.text_from}: {error}") from error
    model = build_detector(sizes)
    own = model.text_encoder.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in own.items() if not name.startswith("projection.")}
    problem = model_file.compare_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()}, expected)
    if problem:
        raise ValueError(f"{config.text_from}: not the weights of the BERT in its config.json: {problem}")
    model.text_encoder.load_state_dict(weights, strict=False)  # all but the projection
    return model


def with_rates(sizes: ModelConfig, rates: ModelConfig) -> ModelConfig:
    """The config `sizes` with the drop path and dropout of `rates`."""
    backbone = dataclasses.replace(sizes.backbone, drop_path_rate=rates.backbone.drop_path_rate)
    return dataclasses.replace(sizes, backbone=backbone, fusion_dropout=rates.fusion_dropout)


def _initial_checkpoint(weights: Path) -> Path:
    """The checkpoint that `weights` names."""
    try:
        return resolve(weights)
    except ValueError as error:
        raise ValueError(f"weights not found or not usable: {error}; name others with --init-from") from error


def training_loader(config: TrainConfig, model: ModelConfig, world: World) -> TrainLoader:
    """The loader of this process's shard of the training data. ValueError for a file that is missing or wrong."""
    data = config.data
    augmentation = Augmentation(
        short_sides=data.train_sides,
        longest_side=data.train_long_side,
        crop_probability=data.crop_probability,
        short_sides_before_crop=data.crop_from_sides,
        crop_sides=data.crop_sides,
        flip_probability=data.flip_probability,
        vertical_flip_probability=data.vertical_flip_probability,
    )
    limits = SampleLimits(model.max_tokens, model.num_queries, model.num_labels)
    dataset = GroundingDataset(training_sources(data), augmentation, config.seed, data.on_bad_sample, limits)
    largest = data.batch_size * data.train_long_side * max(data.train_sides) * BYTES_PER_PIXEL
    workers = affordable_workers(data.workers, largest * world.size)  # all may be on this host
    padding = Padding()
    if data.size_buckets > 0:
        padding = padding_for(data.size_buckets, (min(data.train_sides), max(data.train_sides)), data.train_long_side)
    options = LoaderOptions(
        data.batch_size,
        workers,
        devices.pins_memory(world.device),
        timeout=config.timeout * 60,
        padding=padding,
        context=devices.loader_context(world.device, workers, GroundingDataset.__module__),
    )
    return build_train_loader(dataset, options, rank=world.rank, world_size=world.size)


def training_sources(data: DataConfig) -> list[TrainingSource]:
    """The training files with their folders, weights and label maps."""
    count = len(data.train_files)
    images = one_each("image_dirs", data.image_dirs, count)
    weights = one_each("sampling_weights", data.sampling_weights, count)
    label_maps = one_each("label_maps", data.label_maps or ("",), count)
    options = ReadOptions(allow_outside=data.allow_outside)
    return [
        TrainingSource(
            load_training(
                data.root / file, data.root / labels if labels else None, data.on_bad_sample, options=options
            ),
            images=data.root / folder,
            name=Path(file).stem,
            weight=weight,
            repeat_threshold=data.repeat_threshold,
        )
        for file, folder, weight, labels in zip(data.train_files, images, weights, label_maps, strict=True)
    ]


def one_each(name: str, values: tuple[Any, ...], count: int, files: str = "training files") -> tuple[Any, ...]:
    """The values, a single one as often as there are files. ValueError for another number of them."""
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise ValueError(f"data.{name} has {len(values)} entries for {count} {files}; give one, or one for each")
    return values


def missing_data(data: DataConfig) -> str | None:
    """One line that names missing data files, where they were searched and how to get them; None without any."""
    folders = {data.root / folder for folder in (*data.image_dirs, *data.evaluation_image_dirs)}
    annotations = {data.root / file for file in (*data.train_files, *filter(None, data.label_maps))}
    annotations |= {data.root / file for _, file in data.evaluation}
    missing = sorted(str(path) for path in folders | annotations if not path.exists())
    if not missing:
        return None
    source = ""
    if any("mdetr_annotations" in file for file in data.train_files):
        source = (
            "images: COCO train2014 (http://images.cocodataset.org/zips/train2014.zip), annotations: MDETR's "
            "mdetr_annotations.tar.gz (https://zenodo.org/records/4729015); "
        )
    return (
        f"data not found: {', '.join(missing)} (looked below {data.root.absolute()}); {source}another place: "
        "--data.root DIR; without any data: train.py quickstart"
    )
