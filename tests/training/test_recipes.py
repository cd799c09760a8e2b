"""mmdetection's recipes as presets: their numbers, and a run of each on tiny data."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import protocol_data
import pytest
from training_runs import SMALL, scenes

from groundingdino.config import TrainConfig, with_settings
from groundingdino.training.recipes import BERT, TRAIN_PRESETS, DataSize, finetune, finetune_epochs, from_scratch
from groundingdino.training.setup import missing_data
from groundingdino.training.trainer import fit

# mmdet `configs/mm_grounding_dino`: epochs, milestones, lr, images per step it is for, flip, first steps of warm-up.
NUMBERS = {
    "refcoco": (5, (3,), 2e-4, 32, 0.0, 0),
    "refcoco+": (5, (3,), 2e-4, 32, 0.0, 0),
    "refcocog": (5, (3,), 2e-4, 32, 0.0, 0),
    "grefcoco": (5, (3,), 2e-4, 32, 0.0, 0),
    "coco": (12, (8, 11), 2e-4, 64, 0.5, 0),
    "lvis": (12, (11,), 2e-4, 64, 0.5, 0),
    "pretrain": (30, (19, 26), 4e-4, 64, 0.5, 1000),
}
DECIDING = {"coco": "AP", "lvis": "AP", "pretrain": "AP", "grefcoco": "F1_score"}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_recipe_has_mmdetections_numbers(name: str) -> None:
    config = TRAIN_PRESETS[name]()
    optimizer, schedule, data = config.optimizer, config.schedule, config.data
    found = (config.epochs, schedule.milestones, optimizer.lr, optimizer.base_batch, data.flip_probability)
    assert (*found, schedule.warmup_steps) == NUMBERS[name]
    assert (optimizer.weight_decay, optimizer.clip_norm, schedule.gamma) == (1e-4, 0.1, 0.1)
    assert dict(optimizer.lr_multipliers) == {"backbone": 0.1, "text_encoder": 0.1, "text_encoder.projection": 1.0}
    assert data.train_sides == tuple(range(480, 801, 32)) and data.crop_from_sides == (400, 500, 600)
    assert (data.crop_sides, data.train_long_side, data.crop_probability) == ((384, 600), 1333, 0.5)
    assert config.evaluate_every == (3 if name == "lvis" else 1)
    assert data.repeat_threshold == (1e-3 if name == "lvis" else 0.0)


def referring(name: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        scenes(root)
        for path in (root / "mdetr_annotations").glob("finetune_refcoco_*.json"):
            document = json.loads(path.read_text())
            if name == "grefcoco" and "train" not in path.name:
                document["annotations"][0]["category_id"] = -1  # describes nothing
            split = path.stem.removeprefix("finetune_refcoco_")
            for each in (split, "test"):
                target = root / "mdetr_annotations" / f"finetune_{name}_{each}.json"
                target.write_text(json.dumps(document))

    return write


def coco(root: Path) -> None:
    protocol_data.coco(root)
    shutil.copytree(root / "val2017", root / "train2017")
    shutil.copy(root / "annotations/instances_val2017.json", root / "annotations/instances_train2017.json")


def lvis(root: Path) -> None:
    protocol_data.lvis(root)
    minival = root / "annotations/lvis_v1_minival_inserted_image_name.json"
    shutil.copy(minival, root / "annotations/lvis_v1_train.json")


def pretrain(root: Path) -> None:
    protocol_data.coco(root / "coco")
    image = {"filename": "a.jpg", "height": protocol_data.HEIGHT, "width": protocol_data.WIDTH}
    detection = {**image, "detection": {"instances": [{"bbox": [2, 2, 30, 30], "label": 1, "category": "cat"}]}}
    region = {"bbox": [2, 2, 30, 30], "phrase": "a cat", "tokens_positive": [[0, 5]]}
    grounding = {**image, "grounding": {"caption": "a cat on a mat", "regions": [region]}}
    config = TRAIN_PRESETS["pretrain"]().data
    for seed, (file, folder, names) in enumerate(
        zip(config.train_files, config.image_dirs, config.label_maps, strict=True)
    ):
        protocol_data.photograph(root / folder / "a.jpg", seed)
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(json.dumps(detection if names else grounding) + "\n")
        if names:
            (root / names).write_text(json.dumps({"0": "dog", "1": "cat"}))


DATA: dict[str, Callable[[Path], None]] = {
    "refcoco": referring("refcoco"),
    "refcoco+": referring("refcoco+"),
    "refcocog": referring("refcocog"),
    "grefcoco": referring("grefcoco"),
    "coco": coco,
    "lvis": lvis,
    "pretrain": pretrain,
}


def shrunk(config: TrainConfig, root: Path) -> TrainConfig:
    """The recipe on a tiny model and tiny images, for one epoch."""
    settings: dict[str, Any] = {
        "model": SMALL,
        "init_from": None,
        "data.root": root,
        "data.train_sides": (48,),
        "data.crop_from_sides": (48,),
        "data.crop_sides": (40, 48),
        "data.evaluation_side": 48,
        "data.batch_size": 4,
        "data.workers": 0,
        "epochs": 1,
        "device": "cpu",
        "pictures": 1,
        "run_dir": root / "run",
    }
    return with_settings(config, settings)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", DATA)
def test_each_recipe_runs_on_tiny_data(name: str, tmp_path: Path) -> None:
    DATA[name](tmp_path)
    config = shrunk(TRAIN_PRESETS[name](), tmp_path)
    assert missing_data(config.data) is None
    result = fit(config)
    first, _ = config.data.evaluation[0]
    assert next(iter(result.figures[first])) == DECIDING.get(name, "precision@1")
    assert result.best >= 0 and set(result.figures) == {split for split, _ in config.data.evaluation}


def test_epochs_follow_the_number_of_images() -> None:
    assert [finetune_epochs(n) for n in (1, 100, 1000, 3000, 10_000, 118_000)] == [50, 50, 50, 25, 12, 12]


def test_a_small_set_of_images_is_learned_in_batches_that_it_fills_and_evaluated_every_fifty_steps() -> None:
    def numbers(images: int, categories: int = 3) -> tuple[Any, ...]:
        found = finetune(DataSize(images, categories))
        schedule = found.schedule
        return (
            found.data.batch_size, found.epochs, schedule.milestones, schedule.warmup_steps,
            found.evaluate_every, found.early_stopping, found.data.repeat_threshold,
        )  # fmt: skip

    assert numbers(2) == (2, 50, (33, 45), 2, 50, 10, 0.0)
    assert numbers(99) == (4, 50, (33, 45), 62, 2, 10, 0.0)  # 25 steps an epoch
    assert numbers(10_000, 100) == (4, 12, (8, 11), 500, 1, 10, 1e-3)


def test_fresh_weights_get_longer_before_a_run_is_given_up() -> None:
    config = from_scratch(DataSize(50, 3))
    schedule = config.schedule
    assert (config.early_stopping, config.freeze, config.ema_decay) == (0, (), 0.998)
    assert (schedule.kind, schedule.warmup_steps, schedule.final) == ("cosine", 13, 0.02)  # one epoch's steps
    assert from_scratch(DataSize(9000, 3)).schedule.warmup_steps == 100
    assert from_scratch(DataSize(50, 3), text_from=Path("bert")).freeze == BERT
