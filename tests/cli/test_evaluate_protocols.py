"""evaluate.py PROTOCOL: table, report, pictures, going on after an interruption, scoring without the model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import tiny_model
from protocol_data import LAYOUTS

from groundingdino.checkpoints.model_file import SOURCE_KEY, save_detector
from groundingdino.cli.evaluate import Arguments, Session, main
from groundingdino.cli.evaluate_detection import published_figures
from groundingdino.evaluation import EvaluationOptions
from groundingdino.evaluation.answer_file import read_answers
from groundingdino.evaluation.report import Figures

SMALL = ["--device", "cpu", "--workers", "0", "--scale", "48", "64"]
RELEASE = "MM-GDINO-B, all"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("coco", "odinw"):
        LAYOUTS[name](tmp_path / name)
    save_detector(tmp_path / "model.safetensors", tiny_model(), {SOURCE_KEY: json.dumps({"release": RELEASE})})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(place: Path, name: str) -> dict:
    return json.loads((place / "evaluation" / f"{name}.json").read_text())


def test_a_protocol_prints_its_figures_and_writes_report_answers_and_pictures(place, capsys):
    assert main(["coco", "--checkpoint", "model.safetensors", "--save-pictures", "1", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"model.safetensors = {RELEASE}: 3 prompts of coco_val2017 about 3 images")
    assert any(line.split()[0] == "AR_medium@100" for line in lines)
    content = report(place, "coco_val2017")
    assert content["protocol"]["figures"].startswith("COCO AP and AR (pycocotools)")
    assert content["protocol"]["image"] == "into 48x64 pixels, Pillow bilinear"
    assert [name for name, _ in content["per_category"]] == ["cat", "traffic light", "dog"]
    assert content["published"] is None  # other image size
    assert len(list((place / "evaluation" / "coco_val2017_misses").glob("*.png"))) == 1


def test_figures_are_computed_again_without_the_model(place, capsys):
    assert main(["coco", "--checkpoint", "model.safetensors", *SMALL]) == 0
    before = report(place, "coco_val2017")
    (place / "model.safetensors").unlink()
    again = ["coco", "--score", "evaluation/coco_val2017.answers", "--output", "again", "--device", "cpu"]
    assert main(again) == 0
    after = json.loads((place / "again" / "coco_val2017.json").read_text())
    for key in ("figures", "per_category", "protocol"):
        assert after[key] == before[key]
    capsys.readouterr()
    assert main(["odinw", "--score", "evaluation/coco_val2017.answers", "--device", "cpu"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_resumed_answers_of_another_image_size_are_refused(place, capsys):
    assert main(["coco", "--checkpoint", "model.safetensors", *SMALL]) == 0
    assert main(["coco", "--checkpoint", "model.safetensors", "--resume", *SMALL]) == 0
    capsys.readouterr()
    assert main(["coco", "--checkpoint", "model.safetensors", "--resume", *SMALL[:-1], "80"]) == 2
    error = capsys.readouterr().err
    assert "holds answers with scale [48, 64], not [48, 80]: start without --resume" in error
    assert len(error.splitlines()) == 1


def test_a_suite_reports_its_average_and_what_is_missing(place, capsys):
    assert main(["odinw", "--checkpoint", "model.safetensors", *SMALL]) == 0
    content = report(place, "odinw_13")
    assert list(content["figures"]) == ["average AP", "pothole", "thermalDogsAndPeople"]
    assert content["notes"][0].startswith("average of 2 of 13 data sets")
    assert set(content["parts"]) == {"pothole", "thermalDogsAndPeople"}
    assert content["images"] == 2
    assert "note: average of 2 of 13 data sets, not comparable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["lvis"],
            "lvis_v1_minival_inserted_image_name.json: no such file; lvis reads annotations/lvis_v1_",
        ),
        (["lvis", "--split", "test"], "lvis has no split 'test': use one of minival, val"),
        (["odinw", "--data-root", "coco"], "odinw reads the data sets' folders, such as Aquarium/ and pothole/"),
        (["retention"], "retention compares reports: give --before REPORT.json ... and --after REPORT.json ..."),
    ],
)
def test_what_is_missing_is_said_in_one_line(place, capsys, arguments, message):
    assert main([*arguments, "--checkpoint", "model.safetensors", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "images", "notes", "expected"),
    [
        ({"protocol": "coco"}, 5000, (), {"AP": 60.1}),
        ({"protocol": "coco"}, 128, (), None),
        ({"protocol": "coco", "annotations": Path("mine.json")}, 5000, (), None),
        ({"protocol": "lvis", "split": "val"}, 19809, (), {"AP": 57.0, "APr": 54.4, "APc": 55.9, "APf": 59.2}),
        ({"protocol": "lvis", "names_per_caption": 80}, 5000, (), None),
        ({"protocol": "dod", "split": "parallel"}, 10, (), {"full AP": 24.0}),
        ({"protocol": "dod"}, 10, (), {"full AP": 19.8}),
        ({"protocol": "grefcoco"}, 10, (), {"F1_score": 46.1, "N_acc": 76.6}),
        ({"protocol": "odinw"}, 10, (), {"average AP": 54.5}),
        ({"protocol": "odinw"}, 10, ("a set is missing",), None),
    ],
)
def test_published_figures_are_shown_only_where_they_were_measured_alike(place, changes, images, notes, expected):
    arguments = Arguments(checkpoint=Path("model.safetensors"), **changes)
    session = Session(arguments, None, None, EvaluationOptions())
    assert published_figures(session, Figures({}, notes=notes), images) == expected
    small = Session(arguments, None, None, EvaluationOptions(scale=(48, 64)))
    assert published_figures(small, Figures({}), images) is None


def test_retention_shows_two_reports_in_one_table(place, capsys):
    assert main(["coco", "--checkpoint", "model.safetensors", *SMALL]) == 0
    content = report(place, "coco_val2017")
    content["figures"] = {"AP": 0.5, "AP50": 0.75}
    (place / "before.json").write_text(json.dumps(content))
    content["figures"] = {"AP": 0.4, "AP50": None}
    (place / "after.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["retention", "--before", "before.json", "--after", "after.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-3:] for line in lines] == [
        ["before", "after", "change"],
        ["50.00", "40.00", "-10.00"],
        ["AP50", "75.00", "-"],
    ]
    content["protocol"]["image"] = "into 800x1333 pixels, Pillow bilinear"
    (place / "after.json").write_text(json.dumps(content))
    assert main(["retention", "--before", "before.json", "--after", "after.json"]) == 0
    assert "coco val2017: NOT measured alike, see image in the reports" in capsys.readouterr().out
    content["split"] = "val2014"
    (place / "after.json").write_text(json.dumps(content))
    assert main(["retention", "--before", "before.json", "--after", "after.json"]) == 2
    assert "coco val2017 was evaluated before only" in capsys.readouterr().err


def test_mixtures_of_two_checkpoints_run_from_one_to_the_other(place, capsys):
    other = tiny_model()
    with torch.no_grad():
        other.decoder.box_heads[-1].fc3.bias += 0.5
    save_detector(place / "tuned.safetensors", other)
    for name in ("model", "tuned"):
        assert main(["coco", "--checkpoint", f"{name}.safetensors", "--output", name, *SMALL]) == 0
    capsys.readouterr()
    mixed = ["coco", "--checkpoint", "tuned.safetensors", "--base", "model.safetensors", "--alpha", "0", "0.5", "1"]
    assert main([*mixed, *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split()[:2] == ["alpha", "AP"] and len(lines) == 3 + 4 + 1
    folders = ("model", "evaluation/alpha_0", "evaluation/alpha_0.5", "evaluation/alpha_1", "tuned")
    answers = [list(read_answers(place / folder / "coco_val2017.answers")[1]) for folder in folders]
    model, none, half, whole, tuned = [np.concatenate([answer.boxes for answer in part]) for part in answers]
    assert np.array_equal(none, model) and np.array_equal(whole, tuned)
    assert np.abs(half - model).max() > 1 and np.abs(half - tuned).max() > 1  # pixels
    content = json.loads((place / "evaluation/alpha_0.5/coco_val2017.json").read_text())
    assert content["release"] is None and content["mixture"] == "0.5 of it, the rest model.safetensors"
    assert (place / "evaluation/alpha.png").stat().st_size > 5000
    for wrong in (["--alpha", "0"], ["--alpha", "2", "--base", "model.safetensors"], ["--alpha", "0", "--base", "no"]):
        assert main(["coco", "--checkpoint", "tuned.safetensors", *wrong, *SMALL]) == 2
        assert capsys.readouterr().err.count("\n") == 1
