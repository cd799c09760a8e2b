"""evaluate.py: a table, a JSON file, pictures of misses, and one line when something is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_cases import tiny_model
from PIL import Image

from groundingdino.checkpoints.model_file import SOURCE_KEY, save_detector
from groundingdino.cli import evaluate, evaluate_referring
from groundingdino.data import ReferringExpression
from groundingdino.evaluation import ImageAnswer
from groundingdino.evaluation.misses import save_misses, worst_misses

SCRIPT = Path(__file__).parents[2] / "evaluate.py"
RELEASE = "MM-GDINO-B, all"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that says it is a release, and two photographs with three expressions."""
    root = tmp_path_factory.mktemp("work")
    save_detector(root / "model.safetensors", tiny_model(), {SOURCE_KEY: json.dumps({"release": RELEASE})})
    (root / "refcoco" / "train2014").mkdir(parents=True)
    (root / "refcoco" / "mdetr_annotations").mkdir()
    images, annotations = [], []
    for number, file in enumerate(["a.png", "b.png", "a.png"]):
        Image.new("RGB", (60, 40), (90, 120, number)).save(root / "refcoco" / "train2014" / file)
        image = {"id": number, "file_name": file, "height": 40, "width": 60, "caption": f"cup {number}"}
        images.append({**image, "dataset_name": "refcoco"})
        annotations.append({"id": number, "image_id": number, "bbox": [5, 5, 20, 20]})
    document = {"images": images, "annotations": annotations}
    (root / "refcoco" / "mdetr_annotations" / "finetune_refcoco_testA.json").write_text(json.dumps(document))
    return root


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--workers", "0", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"}


def test_the_command_prints_figures_and_writes_report_and_pictures(place: Path):
    small = ["--scale", "64", "96"]
    done = run(["--split", "testA", "--checkpoint", "model.safetensors", "--save-pictures", "2", *small], place)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"model.safetensors = {RELEASE}: 3 expressions about 2 images")
    assert lines[2].split() == ["P@1", "P@5", "P@10", "AP"]
    assert lines[3].startswith("refcoco testA, measured") and len(lines[3].split()) == 3 + 4
    report = json.loads((place / "evaluation" / "refcoco_testA.json").read_text())
    assert report["release"] == RELEASE and report["published"] == {"refcoco": None}  # other image size
    assert report["protocol"]["image"] == "into 64x96 pixels, Pillow bilinear"
    assert report["protocol"]["scoring"].startswith("max")
    pictures = list((place / "evaluation" / "refcoco_testA_misses").glob("*.png"))
    misses = round(3 * (1 - report["precision"]["refcoco"]["1"]))
    assert len(pictures) == min(2, misses)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "gone.safetensors"], "evaluate.py: no checkpoint at "),
        (
            ["--checkpoint", "model.safetensors", "--data-root", "nowhere"],
            "evaluate.py: data not found: nowhere/train2014",
        ),
    ],
)
def test_what_is_missing_is_said_in_one_line(place: Path, arguments: list[str], message: str):
    done = run(["--split", "testA", *arguments], place)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(message)


def test_published_figures_are_shown_only_where_they_were_measured_alike():
    def row(scale=(800, 1333), **changes) -> list[float] | None:
        return evaluate_referring.published_row(evaluate.Arguments(split="val", **changes), scale, RELEASE, "refcoco")

    assert row() == [80.3, 98.6, 99.5]
    assert row(scoring="subject") is row(scoring="llmdet") is None
    assert row(scale=(600, 1000)) is None
    assert row(annotations=Path("mine.json")) is None


def test_a_file_of_several_data_sets_gets_a_line_for_each():
    content = {
        "protocol": {"scoring": "max"},
        "precision": {"refcoco": {"1": 0.5, "5": 1.0, "10": 1.0}, "refcoco+": {"1": 0.25, "5": 0.5, "10": 1.0}},
        "average_precision": 0.31,
        "published": {"refcoco": None, "refcoco+": [83.5, 98.3, 99.4]},
        "floor": {"largest box": {"refcoco": 0.4, "refcoco+": 0.41}},
    }
    lines = evaluate_referring.table(content, "val")
    assert lines[0] == "scoring max"
    assert [line.split()[-3:] for line in lines[2:]] == [
        ["50.00", "100.00", "100.00"],
        ["largest", "box", "40.00"],
        ["25.00", "50.00", "100.00"],
        ["83.5", "98.3", "99.4"],
        ["largest", "box", "41.00"],
        ["all", "together", "31.00"],
    ]


def test_the_worst_misses_come_first_and_hits_do_not_come_at_all(tmp_path: Path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    expressions = [ReferringExpression(n, n + 1, "a.png", "cup", "refcoco", (10.0, 10, 30, 20)) for n in range(5)]
    boxes = [[10, 10, 30, 20], [10, 10, 19, 20], [40, 30, 50, 40], [40, 30, 50, 40]]
    scores = [0.9, 0.9, 0.3, 0.8]
    answers = [
        ImageAnswer(n, np.array([box], dtype=np.float32), np.array([score], dtype=np.float32), np.zeros(1, int))
        for n, (box, score) in enumerate(zip(boxes, scores, strict=True))
    ]
    answers.append(ImageAnswer(4, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, int)))
    misses = worst_misses(expressions, answers)
    assert [answer.image_id for _, answer in misses] == [3, 2, 4, 1]
    assert [round(iou, 2) for iou, _ in misses] == [0, 0, 0, 0.45]
    saved = save_misses(expressions, answers, tmp_path, tmp_path / "misses", 3)
    assert [path.name for path in saved] == [
        "001_iou0.00_entry4.png",
        "002_iou0.00_entry3.png",
        "003_iou0.00_entry5.png",
    ]
    assert all(Image.open(path).width > 120 for path in saved)
