"""What only training, evaluation or the page needs is not needed elsewhere, and is named where it is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from golden_cases import tiny_model
from training_runs import environment

from groundingdino.checkpoints.model_file import save_detector

WITHOUT = """
import json, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from groundingdino.cli.main import main
sys.exit(max(main(arguments) for arguments in json.loads(sys.argv[2])))
"""
TRAIN = "scipy,pycocotools,tensorboard,matplotlib"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_detector(path, tiny_model())
    return path


def run(missing: str, *commands: list[object]) -> subprocess.CompletedProcess[str]:
    """The commands in one process that cannot import what is missing."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    command = [sys.executable, "-c", WITHOUT, missing, words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


def test_predicting_converting_and_checking_need_no_extra(checkpoint: Path, golden: Path, tmp_path: Path) -> None:
    without = f"{TRAIN},gradio,transformers,supervision"
    photo = golden / "photos" / "train2014" / "COCO_train2014_000000000001.jpg"
    small = ["--scale", 96, 160, "--save", tmp_path / "out.jpg"]
    done = run(
        without,
        ["predict", photo, "--checkpoint", checkpoint, "--phrases", "a man with a flag", *small],
        ["convert", golden / "tiny/mmdet_checkpoint.pth", tmp_path / "x.safetensors"],
        ["info", checkpoint],
        ["selfcheck", "--device", "cpu", "--repeats", 0],
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", TRAIN.split(","))
def test_training_without_its_extra_says_what_to_install_before_anything_else(package: str, tmp_path: Path) -> None:
    done = run(package, ["train", "--data.root", tmp_path, "--run-dir", tmp_path / "run"])
    assert done.returncode == 2
    message = f'{package} not installed: pip install "groundingdino[train]"'
    assert done.stderr.splitlines() == [f"groundingdino train: {message}"]
    assert not list(tmp_path.iterdir())


def test_the_page_without_its_extra_says_what_to_install(checkpoint: Path) -> None:
    done = run("gradio", ["demo", "--checkpoint", checkpoint])
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert 'pip install "groundingdino[demo]"' in done.stderr
