"""Fine-tuning on data of one's own: from a folder of any format to a predictor and its figures."""

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes_data import write_shapes
from training_runs import SMALL, losses

import groundingdino as gd
from groundingdino.checkpoints.model_file import save_detector
from groundingdino.config import TrainConfig, with_settings
from groundingdino.data.convert import convert
from groundingdino.data.formats.record import ReadOptions
from groundingdino.data.prepare import prepare
from groundingdino.model import build_detector
from groundingdino.training.finetune import FinetuneResult, Task, finetune, plan
from groundingdino.training.recorder import StepValues
from groundingdino.training.trainer import FitResult, fit
from groundingdino.training.validation import Assessment

TINY = {
    "data.train_sides": (48, 56),
    "data.evaluation_side": 48,
    "data.workers": 0,
    "data.batch_size": 2,
    "device": "cpu",
    "pictures": 2,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data")


class Diary(gd.Callback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.evaluations: list[tuple[int, Mapping[str, Mapping[str, float]]]] = []

    def on_steps(self, steps: Sequence[StepValues], images_per_second: float) -> None:
        self.steps += [step.step for step in steps]

    def on_evaluation(self, step: int, epoch: int, figures: Mapping[str, Mapping[str, float]]) -> None:
        self.evaluations.append((epoch, figures))


def tiny(data: Path, run: Path, **settings: Any) -> FinetuneResult:
    return finetune(data, SMALL, run_dir=run, epochs=1, settings={**TINY, **settings})


def test_a_folder_becomes_a_predictor_and_figures(
    shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "groundingdino")
    diary, state, generator = Diary(), random.getstate(), torch.get_rng_state()
    settings = {**TINY, "evaluate_every": 1}
    result = gd.finetune(shapes, SMALL, run_dir=tmp_path / "run", epochs=2, settings=settings, callbacks=[diary])

    assert diary.steps == list(range(1, 9)) and [epoch for epoch, _ in diary.evaluations] == [1, 2]
    assert list(result.figures) == ["test"]
    assert {"AP", "AP50", "AP75", "AP_small", "AR@1", "AR@10", "AR@100"} <= set(result.figures["test"])
    assert set(diary.evaluations[0][1]) == {"val"}
    assert {"best", "final", "metrics", "curves", "pictures"} == set(result.files)
    found = result.predictor.predict(shapes / "test" / "test_000.png", categories=["circle", "square"], threshold=0.0)
    assert len(found.boxes) and result.predictor.scale == (48, 640)
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), generator)
    said = "\n".join(caplog.messages)
    for part in (
        "coco; images: 8 to train on, 2 to validate, 2 to test",
        "3 categories: circle, square, triangle",
        "decoder ",
        "GiB of memory",
        "for 8 steps",
        "best checkpoint, test: AP ",
    ):
        assert part in said, part


def test_coco_and_yolo_give_the_same_entries_and_the_same_losses(shapes: Path, tmp_path: Path) -> None:
    convert(shapes, tmp_path / "yolo", "yolo")
    ours, theirs = (prepare(data, _made(tmp_path / data.name)) for data in (shapes, tmp_path / "yolo"))
    assert (ours.counts, ours.categories, ours.format) == (theirs.counts, theirs.categories, "coco")
    for a, b in zip(_lines(ours.files["train"]), _lines(theirs.files["train"]), strict=True):
        assert Path(a["filename"]).name == Path(b["filename"]).name
        for one, other in zip(a["detection"]["instances"], b["detection"]["instances"], strict=True):
            assert one["label"] == other["label"] and one["bbox"] == pytest.approx(other["bbox"], abs=1e-6)
    tiny(shapes, tmp_path / "a")
    tiny(tmp_path / "yolo", tmp_path / "b")
    first, second = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert len(first) == 4
    for step in first:
        assert first[step]["loss"] == pytest.approx(second[step]["loss"], rel=1e-5)


def _made(folder: Path) -> Path:
    folder = folder.with_name(f"{folder.name}-prepared")
    folder.mkdir()
    return folder


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_data_set_without_splits_is_split_and_it_is_said(shapes: Path, tmp_path: Path) -> None:
    alone = shapes / "train" / "_annotations.coco.json"
    prepared = prepare(alone, tmp_path)
    assert prepared.counts == {"train": 6, "val": 1, "test": 1}
    assert prepared.notes == ("no splits found: split by image into train, val and test, 80% / 10% / 10%",)


def test_a_data_set_too_small_for_a_test_split_has_none(shapes: Path, tmp_path: Path) -> None:
    document = json.loads((shapes / "train" / "_annotations.coco.json").read_text())
    document["images"] = document["images"][:6]
    kept = {image["id"] for image in document["images"]}
    document["annotations"] = [one for one in document["annotations"] if one["image_id"] in kept]
    (tmp_path / "few.json").write_text(json.dumps(document))
    prepared = prepare(tmp_path / "few.json", _made(tmp_path / "few"), ReadOptions(shapes / "train"))
    assert prepared.counts == {"train": 5, "val": 1, "test": 0} and set(prepared.files) == {"train", "val"}
    assert prepared.notes[-1] == "no image is left to test on"


def test_names_rename_categories_and_join_those_that_get_one_name(shapes: Path, tmp_path: Path) -> None:
    prepared = prepare(shapes, tmp_path, names={"square": "box", "triangle": "box"})
    assert prepared.categories == ("circle", "box")
    assert json.loads((tmp_path / "train_label_map.json").read_text()) == {"0": "circle", "1": "box"}
    labels = [i["label"] for line in _lines(prepared.files["train"]) for i in line["detection"]["instances"]]
    assert set(labels) == {0, 1} and len(labels) == len(_all_boxes(shapes / "train"))
    document = json.loads(prepared.files["val"].read_text())
    assert [category["name"] for category in document["categories"]] == ["circle", "box"]
    ids = {category["id"] for category in document["categories"]}
    assert {one["category_id"] for one in document["annotations"]} <= ids
    with pytest.raises(ValueError, match="names for cube, which the data do not have: circle, square, triangle"):
        prepare(shapes, tmp_path, names={"cube": "box"})


def _all_boxes(folder: Path) -> list[Any]:
    return list(json.loads((folder / "_annotations.coco.json").read_text())["annotations"])


def test_the_recipe_fits_the_size_of_the_data(shapes: Path, tmp_path: Path) -> None:
    _, config = plan(Task(shapes, "weights.safetensors", tmp_path / "run"))
    assert (config.epochs, config.init_from, config.data.batch_size) == (50, Path("weights.safetensors"), 4)
    assert config.freeze == ("text_encoder.embeddings", "text_encoder.layers")
    assert config.data.flip_probability == 0.5 and config.early_stopping > 0 and config.evaluate_every == 25
    _, config = plan(Task(shapes, "weights.safetensors", tmp_path / "run", steps=24))
    assert config.epochs == 12 and config.schedule.milestones == (8, 11)


def test_a_run_stops_where_the_figures_stop_rising(shapes: Path, tmp_path: Path) -> None:
    settings = {**TINY, "optimizer.lr": 0.0, "early_stopping": 2, "evaluate_every": 1, "ema_decay": 0.0}
    finetune(shapes, SMALL, run_dir=tmp_path, epochs=9, settings=settings)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "evaluation" in row] == [1, 2, 3]  # the first is the best


def test_a_run_goes_on_where_it_ended_and_other_data_do_not_overwrite_it(shapes: Path, tmp_path: Path) -> None:
    tiny(shapes, tmp_path / "run")
    before = (tmp_path / "run/data/train.jsonl").read_bytes()
    with pytest.raises(ValueError, match="go on with --resume auto"):
        tiny(shapes / "train", tmp_path / "run")
    assert (tmp_path / "run/data/train.jsonl").read_bytes() == before
    finetune(shapes, SMALL, run_dir=tmp_path / "run", epochs=2, settings={**TINY, "resume": "auto"})
    assert sorted(losses(tmp_path / "run")) == list(range(1, 9))


def test_a_setting_that_does_not_exist_is_named(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no setting batch_sise; there are root, train_files"):
        tiny(shapes, tmp_path, **{"data.batch_sise": 3})


def test_absolute_file_names_train_where_they_are_allowed(shapes: Path, tmp_path: Path) -> None:
    document = json.loads((shapes / "train/_annotations.coco.json").read_text())
    for image in document["images"]:
        image["file_name"] = str(shapes / "train" / image["file_name"])
    (tmp_path / "data.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="no usable entry"):
        plan(Task(tmp_path / "data.json", SMALL, tmp_path / "run"))
    task = Task(tmp_path / "data.json", SMALL, tmp_path / "run", epochs=1)
    allowed = dataclasses.replace(task, reading=dataclasses.replace(task.reading, allow_outside=True))
    _, config = plan(allowed)
    assert config.data.allow_outside
    result = fit(with_settings(config, TINY))
    assert result.steps == 3 and "AP" in result.figures["val"]


def test_captions_are_trained_and_measured_as_expressions(data: Path, tmp_path: Path) -> None:
    result = tiny(data, tmp_path / "run")
    assert list(result.figures) == ["val"] and "precision@1" in result.figures["val"]
    assert (tmp_path / "run/data/train.jsonl").is_file() and not (tmp_path / "run/data/val.json").exists()


def test_the_estimate_at_the_start_changes_nothing(shapes: Path, tmp_path: Path) -> None:
    tiny(shapes, tmp_path / "with")
    _, config = plan(Task(shapes, SMALL, tmp_path / "without", epochs=1))
    fit(with_settings(config, TINY))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


class Weighs:
    """In place of an assessor: tells which model it was given."""

    def __init__(self, config: TrainConfig) -> None:
        pass

    def assess(self, model: torch.nn.Module) -> Assessment:
        return Assessment({"test": {"weight": weight(model)}}, {"test": ()})


def weight(model: torch.nn.Module) -> float:
    return next(model.parameters()).double().sum().item()


def test_the_best_checkpoint_of_a_run_is_tested_and_not_the_last(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, weights = {}, {}
    for seed, name in enumerate(("best", "final")):
        torch.manual_seed(seed)
        model = build_detector(SMALL)
        weights[name] = weight(model)
        files[name] = tmp_path / f"{name}.safetensors"
        save_detector(files[name], model)
    monkeypatch.setattr("groundingdino.training.finetune.fit", lambda *_: FitResult(tmp_path, 1, {}, 0.0, files))
    monkeypatch.setattr("groundingdino.training.finetune.Assessor", Weighs)
    assert tiny(shapes, tmp_path / "run").figures == {"test": {"weight": weights["best"]}}
    assert weights["best"] != weights["final"]
