"""The notebooks' code cells, run as they are on small data; only the first cell's settings are replaced."""

import json
from pathlib import Path

import pytest
from golden_cases import tiny_model
from shapes_data import write_shapes
from training_runs import SMALL

from groundingdino.checkpoints.model_file import SCALE_KEY, save_detector

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SMALL_TRAINING = {
    "data.train_sides": (48,), "data.evaluation_side": 48, "data.workers": 0, "data.batch_size": 4, "device": "cpu",
    "pictures": 0,
}  # fmt: skip


def run(name: str, settings: dict[str, object]) -> dict[str, object]:
    """Execute the cells one after the other; the names that they leave."""
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    first, *others = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    exec(first, names)
    assert settings.keys() <= names.keys(), "the first cell has settings that are replaced"
    names |= settings
    for code in others:
        exec(compile(code, f"{name}.ipynb", "exec"), names)
    return names


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the tiny model."""
    save_detector(tmp_path / "tiny.safetensors", tiny_model(), {SCALE_KEY: "[48, 64]"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_predict(place: Path, golden: Path) -> None:
    photo = golden / "photos/train2014/COCO_train2014_000000000001.jpg"
    names = run("predict", {"CHECKPOINT": "tiny.safetensors", "PHOTO": str(photo)})
    assert names["picture"].width >= 1 and len(names["best"].boxes) == 1  # type: ignore[attr-defined]


def test_label(place: Path) -> None:
    write_shapes(place / "data", train=3)
    options = ["--device", "cpu", "--workers", "0", "--threshold", "0.03", "--keep-above", "0.01"]
    names = run("label", {"CHECKPOINT": "tiny.safetensors", "IMAGES": "data/train", "OPTIONS": options})
    assert len(names["labels"]["images"]) == 3 and names["labels"]["annotations"]  # type: ignore[index]


def test_finetune(place: Path) -> None:
    write_shapes(place / "data", train=4)
    names = run("finetune", {"DATA": "data", "START": SMALL, "EPOCHS": 1, "SETTINGS": SMALL_TRAINING})
    assert "AP" in names["result"].figures["test"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_output(path: Path) -> None:
    assert all(not cell.get("outputs") for cell in json.loads(path.read_text())["cells"])
