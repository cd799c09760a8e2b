"""Other data before and after a fine-tune, and other data mixed in."""

import json
from pathlib import Path

import pytest
import torch
from protocol_data import LAYOUTS
from shapes_data import write_shapes
from training_runs import SMALL

import groundingdino as gd
from groundingdino.checkpoints.model_file import load_detector, save_detector
from groundingdino.cli.evaluate import main as evaluate_command
from groundingdino.config import DataConfig, TrainConfig
from groundingdino.data.convert import convert
from groundingdino.model import GroundingDINO, build_detector
from groundingdino.training import retention
from groundingdino.training.finetune import Task, plan
from groundingdino.training.retention import retained_data, with_replay
from groundingdino.training.setup import training_sources
from groundingdino.training.validation import Assessment

TINY = {"data.train_sides": (48,), "data.workers": 0, "data.batch_size": 2, "device": "cpu", "optimizer.lr": 1e-2}


def weight(model: GroundingDINO) -> float:
    return model.decoder.layers[0].ffn.fc1.weight.double().sum().item()  # type: ignore[union-attr, operator]


class Scales:
    """In place of an assessor: tells which model it was given."""

    def __init__(self, config: TrainConfig) -> None:
        ((_, self.file),) = config.data.evaluation

    def assess(self, model: GroundingDINO) -> Assessment:
        assert Path(self.file).exists()
        return Assessment({"retain": {"weight": weight(model)}}, {})


def test_retained_data_are_measured_on_the_first_and_on_the_best_model_and_both_are_printed(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "groundingdino")
    monkeypatch.setattr(retention, "Assessor", Scales)
    torch.manual_seed(3)
    start, run = tmp_path / "start.safetensors", tmp_path / "run"
    save_detector(start, build_detector(SMALL))
    expressions = data / "mdetr_annotations" / "finetune_refcoco_val.json"
    settings = {**TINY, "data.evaluation_side": 48, "lora": 2}
    shapes = write_shapes(tmp_path / "shapes", train=4)
    result = gd.finetune(shapes, start, run_dir=run, epochs=1, settings=settings, retain=expressions)
    first, best = (weight(load_detector(path)) for path in (start, result.files["best"]))
    assert first != best and result.figures["retain"] == {"weight": best}
    assert f"retain finetune_refcoco_val, weight{100 * first:17.2f}{100 * best:9.2f}".split() in [
        line.split()[:-1] for line in caplog.messages
    ]
    reports = [str(run / name) for name in (retention.BEFORE, retention.AFTER)]
    assert evaluate_command(["retention", "--before", reports[0], "--after", reports[1]]) == 0

    # A resumed run does not measure the trained model as the one before
    settings |= {"resume": "auto", "epochs": 2}
    gd.finetune(shapes, start, run_dir=run, settings=settings, retain=expressions)
    assert json.loads((run / retention.BEFORE).read_text())["figures"] == {"weight": first}


def test_retained_data_of_any_format_keep_their_own_names(tmp_path: Path) -> None:
    shapes = write_shapes(tmp_path / "shapes", train=2)
    convert(shapes / "test" / "_annotations.coco.json", tmp_path / "voc", "voc")
    found = retained_data(tmp_path / "voc", tmp_path)
    document = json.loads(found.file.read_text())
    assert {one["name"] for one in document["categories"]} <= {"circle", "square", "triangle"}
    assert len(document["images"]) == 2 and found.images.is_dir()


def test_retained_data_of_coco_lvis_and_mdetr_are_measured_as_they_are(tmp_path: Path) -> None:
    for name in ("coco", "lvis", "grefcoco"):
        LAYOUTS[name](tmp_path / name)
        (source,) = (tmp_path / name).glob("*annotations/*.json")
        found = retained_data(source, tmp_path)
        assert found.file == source and not (tmp_path / "retain.json").exists()


def test_replay_makes_other_data_a_share_of_each_epoch(data: Path, tmp_path: Path) -> None:
    others = data / "mdetr_annotations" / "finetune_refcoco_train.json"  # 16 captions
    shapes = write_shapes(tmp_path / "shapes", train=8)
    _, config = plan(Task(shapes, SMALL, tmp_path / "run", replay=f"{others}:0.2"))
    own, replayed = training_sources(config.data)
    assert len(own.annotations) * own.weight == 8 and len(replayed.annotations) * replayed.weight == 2
    assert own.annotations.label_map is not None and replayed.annotations.label_map is None
    assert (replayed.images / replayed.annotations.entry(0).file_name).exists()
    for wrong in (str(others), f"{others}:1", f"{others}:much", ":0.2"):
        with pytest.raises(ValueError, match="give FILE:SHARE, such as"):
            with_replay(DataConfig(), wrong, 8)
