"""`train.py finetune`: the command line around fine-tuning."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shapes_data import write_shapes
from training_runs import REPOSITORY, SMALL, environment

from groundingdino.checkpoints import model_file
from groundingdino.cli.finetune import main
from groundingdino.config import with_settings
from groundingdino.model import build_detector
from groundingdino.training.finetune import Task, plan
from groundingdino.training.validation import Assessor

TINY = (
    "--epochs 1 --data.train-sides 48 --data.evaluation-side 48 --data.workers 0 --data.batch-size 4 --device cpu "
    "--data.crop-probability 0 --pictures 0"
).split()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    model_file.save_detector(path, build_detector(SMALL))
    return path


def test_released_weights_learn_a_folder_and_bert_stays(
    shapes: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.yaml").write_text("square: box\n")
    arguments = ["--data", str(shapes), "--init", str(weights), "--run-dir", str(tmp_path / "run")]
    assert main([*arguments, "--names", str(tmp_path / "names.yaml"), *TINY, "--ema-decay", "0"]) == 0
    said = capsys.readouterr().out
    assert "3 categories: circle, box, triangle" in said and "best checkpoint, test: AP " in said
    assert re.search(r"text_encoder .* trained at", said) and f"best: {tmp_path}/run/best.safetensors" in said
    assert json.loads((tmp_path / "run/data/train_label_map.json").read_text())["1"] == "box"
    before, after = (model_file.load_detector(p).state_dict() for p in (weights, tmp_path / "run/final.safetensors"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    bert = {n for n in before if n.startswith(("text_encoder.embeddings.", "text_encoder.layers."))}
    assert same == bert


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which checkpoint? Give --checkpoint"),
        (["--fresh", "small", "--init", "mm-gdino-t"], "weights to start from, or fresh ones, not both"),
        (["--init", "small.safetensors", "--text-from", "bert"], "--text-from is for fresh weights"),
        (["--fresh", "small", "--data.batch-sise", "3"], "--data.batch-sise"),
        (["--fresh", "small", "--epochs", "many"], "many"),
        (["--fresh", "small"], "nowhere: no such file or folder"),
    ],
)
def test_what_a_user_can_fix_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--data", "nowhere", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_help_says_what_data_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("--data", "--init", "--fresh", "--names", "--steps", "Pascal VOC"))


@pytest.mark.slow
def test_two_processes_evaluate_every_image_once(shapes: Path, weights: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    arguments = ["--data", str(shapes), "--init", str(weights), "--run-dir", "run", *TINY]
    command = [*launch, "--", str(REPOSITORY / "train.py"), "finetune", *arguments]
    found = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (reported,) = [row["evaluation"] for row in rows if "evaluation" in row]
    _, config = plan(Task(shapes, weights, tmp_path / "again"))
    config = with_settings(config, {"data.evaluation_side": 48, "data.workers": 0, "pictures": 0})
    alone = Assessor(config).assess(model_file.load_detector(tmp_path / "run/best.safetensors"))
    assert reported == {"val": pytest.approx(alone.figures["val"], abs=1e-6)}
