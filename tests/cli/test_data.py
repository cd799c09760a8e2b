"""`groundingdino data`."""

import json
from pathlib import Path

import pytest
from PIL import Image

from groundingdino.cli import data

ANNOTATIONS = Path(__file__).parent.parent / "golden" / "data" / "mdetr_annotations"
MDETR = ANNOTATIONS / "finetune_refcoco_train.json"


def test_convert_writes_mmdets_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["convert", str(MDETR), str(tmp_path / "vg.json"), "--to", "odvg"]) == 0
    assert (tmp_path / "vg.json").read_text() == (ANNOTATIONS / "finetune_refcoco_train_vg.json").read_text()
    assert "41 entries with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a command (convert"),
        (["convrt"], "no command 'convrt' (perhaps convert?)"),
        (["convert", "gone.json", "x.json", "--to", "odvg"], "gone.json: no such file or folder"),
        (["convert", str(MDETR), str(MDETR), "--to", "odvg"], "is what is read"),
        (["convert", str(MDETR)], "OUT"),
        (["convert", str(MDETR), "x", "--to", "tfrecord"], "tfrecord"),
        (["check", "gone"], "gone: no such file or folder"),
        (["check", "."], "no annotations in a known format"),
        (["show", "gone"], "gone: no such file or folder"),
        (["split", str(MDETR), "0.5", "0.4", "--out", "x"], "sum to 1"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert data.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not list(tmp_path.iterdir())


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    """Four images with a box each, of which one lies outside."""
    images, annotations = [], []
    for number in range(4):
        Image.new("RGB", (60, 40), (number * 60, 0, 0)).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 60, "height": 40})
        x = 5 if number else 90
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [x, 5, 20, 20]})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cup"}]}
    (tmp_path / "train.json").write_text(json.dumps(document))
    return tmp_path / "train.json"


def test_check_reports_draws_and_corrects(boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--picture", str(tmp_path / "counts.png"), "--fix", str(tmp_path / "fixed.json")]
    assert data.main(["check", str(boxes), *out]) == 1
    printed = capsys.readouterr().out
    assert "box outside the image: 1\n  " in printed and "train.json: images entry 1: annotations entry 1" in printed
    assert "box outside the image: corrected or left out: 1" in printed
    assert Image.open(tmp_path / "counts.png").size == (1200, 800)
    assert data.main(["check", str(tmp_path / "fixed.json"), "--no-images"]) == 0
    assert "image without boxes: 1 (note)" in capsys.readouterr().out


def test_show_draws_a_grid_or_a_folder(boxes: Path, tmp_path: Path) -> None:
    assert data.main(["show", str(boxes), "--out", str(tmp_path / "grid.png"), "--columns", "2"]) == 0
    width, height = Image.open(tmp_path / "grid.png").size
    assert width > 2 * 60 and height > 2 * 40
    assert data.main(["show", str(boxes), "--out", str(tmp_path / "drawn"), "--count", "3"]) == 0
    pictures = sorted((tmp_path / "drawn").iterdir())
    assert len(pictures) == 3
    assert any(Image.open(picture).getcolors(9999) != [(2400, (60, 0, 0))] for picture in pictures)


def test_split_writes_the_parts(boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["split", str(boxes), "0.5", "0.5", "--out", str(tmp_path / "parts")]) == 0
    assert "2 train entries, 2 val entries" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["train.json", "val.json"]
