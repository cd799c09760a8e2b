"""`groundingdino predict`, run as a user would."""

import json
import subprocess
import sys

import numpy as np
import pytest
from golden_cases import tiny_model
from PIL import Image

from groundingdino.checkpoints.model_file import save_detector
from groundingdino.cli import main as command_line
from groundingdino.cli import predict
from groundingdino.inference.predictor import load_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_detector(path, tiny_model(), {"groundingdino.source": json.dumps({"file": "mmdet_checkpoint.pth"})})
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for name in ("b", "a"):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def run(*arguments):
    small = ["--scale", "96", "160"] if "--scale" not in arguments else []
    return command_line.main([str(argument) for argument in (*arguments, *small)])


def test_predict_prints_json_saves_a_picture_and_is_silent_otherwise(checkpoint, photos, tmp_path):
    command = [
        sys.executable, "-m", "groundingdino", "predict", photos / "a.png", "--checkpoint", checkpoint,
        "--categories", "cat, dog", "--scale", "96", "160", "--threshold", "0.01", "--top-k", "3",
        "--save", tmp_path / "out.jpg",
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    row = json.loads(line)
    assert row["image"] == str(photos / "a.png")
    assert len(row["detections"]) == 3 and {d["name"] for d in row["detections"]} <= {"cat", "dog"}
    with Image.open(tmp_path / "out.jpg") as picture, Image.open(photos / "a.png") as photo:
        assert picture.size == (420, 280)  # 7 times as large, to have room for labels
        shown = np.array(picture, dtype=float)
        plain = np.array(photo.resize((420, 280), Image.Resampling.BICUBIC), dtype=float)
    changed = (np.abs(shown - plain).max(axis=-1) > 60).mean()  # boxes and labels; JPEG changes less
    assert 0.002 < changed < 0.5


def test_a_folder_gives_a_line_and_a_picture_an_image_and_says_what_it_skipped(checkpoint, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"no image")
    code = run("predict", photos, "--checkpoint", checkpoint, "--refer", "the cat", "--json", tmp_path / "out.jsonl",
               "--save", tmp_path / "pictures")  # fmt: skip
    assert code == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "skipped: " in captured.err and "broken.jpg" in captured.err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [str(photos / "a.png"), str(photos / "b.png")]
    assert [row["detections"][0]["name"] for row in rows] == ["the cat", "the cat"]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--phrases", "a dog near a cat"], {"a dog", "a cat"}),
        (["--caption", "a dog near a cat", "--spans", "0:5", "2:5,13:16"], {"a dog", "dog / cat"}),
        (["--refer", "a dog near a cat", "--scoring", "subject", "--top-k", "9"], {"a dog near a cat"}),
    ],
)
def test_every_mode_has_its_option(checkpoint, photos, capsys, arguments, names):
    code = run("predict", photos / "a.png", "--checkpoint", checkpoint, "--threshold", "0.0", *arguments)
    assert code == 0
    row = json.loads(capsys.readouterr().out)
    assert {d["name"] for d in row["detections"]} == names


def test_the_printed_boxes_are_the_predictors(checkpoint, photos, capsys):
    run("predict", photos, "--checkpoint", checkpoint, "--categories", "cat", "--threshold", "0", "--nms", "0.5")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = load_model(checkpoint, "cpu", scale=(96, 160)).predict(photos, categories=["cat"], threshold=0.0, nms=0.5)
    for row, detections in zip(rows, found, strict=True):
        boxes = [d["box"] for d in row["detections"]]
        np.testing.assert_allclose(boxes, detections.boxes.numpy(), atol=0.006)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "x.png"], "give one of --categories"),
        (["predict", "x.png", "--categories", "cat", "--refer", "cat"], "got 2"),
        (["predict", "--categories", "cat"], "no image given"),
        (["predict", "x.png", "--caption", "a cat", "--spans", "2"], "write START:END"),
        (["predict", "x.png", "--categories", "cat"], "which checkpoint"),
        (["predict", "x.png", "--categories", "cat", "--checkpoint", "none.safetensors"], "none.safetensors"),
        (["predict", "x.png", "--threshold", "high", "--categories", "cat"], "--threshold"),
        (["predict", "x.png", "--batch-size", "0", "--categories", "cat"], "--batch-size 0"),
        (["predict", "x.png", "--scale", "0", "0", "--categories", "cat"], "--scale 0 0"),
        (["predict", "x.png", "--scale", "99999", "99999", "--categories", "cat"], "--scale 99999 99999"),
        (["predict", "x.png", "--scale", "800", "600", "--categories", "cat"], "--scale 800 600"),
        (["predict", "x.png", "--tresholt", "1", "--categories", "cat"], "--tresholt"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert command_line.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize("sentence", ["a \ud83d cat", "a \udcff cat"])  # half an emoji; a byte that is no UTF-8
def test_half_a_surrogate_pair_in_a_sentence_is_one_line(checkpoint, photos, capsys, sentence):
    assert run("predict", photos / "a.png", "--checkpoint", checkpoint, "--refer", sentence) == 2
    captured = capsys.readouterr()
    assert "half a surrogate pair" in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_a_reader_that_stops_early_is_no_error(checkpoint, photos):
    command = f"{sys.executable} -m groundingdino predict {photos} --checkpoint {checkpoint} --refer cat --scale 96 160"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | true"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_images_of_the_same_name_get_pictures_of_their_own(tmp_path):
    paths = [tmp_path / "x" / "a.png", tmp_path / "y" / "a.png", tmp_path / "z" / "a.jpg"]
    pictures = predict.picture_paths(tmp_path / "out", paths)
    assert [pictures[path].name for path in paths] == ["a.jpg", "a_2.jpg", "a_3.jpg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos", "--save", "photos"], "--save photos is the folder of the images"),
        (["photos", "--save", "same"], "--save same is the folder of the images"),
        (["photos/a.png", "--save", "photos/a.png"], "--save would overwrite photos/a.png"),
        (["photos/a.png", "--save", "link.png"], "--save would overwrite link.png"),
        (["photos/a.jpg", "photos/b.png", "--save", "photos"], "--save would overwrite photos/a.jpg"),
        (["photos/a.png", "--save", "out.xyz"], "a picture ends in .jpg"),
        (["photos/a.png", "--save", "photos/a.png/x.png"], "File exists: photos/a.png"),
        (["photos/a.png", "--json", "photos/a.png"], "--json would overwrite photos/a.png"),
        (["photos/a.png", "--json", "tiny.safetensors"], "--json would overwrite tiny.safetensors"),
        (["photos/a.png", "--json", "photos"], "--json would write photos, which is a folder"),
        (["photos/a.png", "--json", "out.jpg", "--save", "out.jpg"], "--json and --save both write out.jpg"),
    ],
)
def test_an_output_over_an_input_is_refused_before_anything_is_read(
    checkpoint, photos, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.safetensors").write_bytes(checkpoint.read_bytes())
    Image.new("RGB", (60, 40)).save(photos / "a.jpg")
    (tmp_path / "same").symlink_to(photos)
    (tmp_path / "link.png").hardlink_to(photos / "a.png")
    monkeypatch.setattr(predict.loading, "load_predictor", lambda *_: pytest.fail("the model was loaded"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run("predict", *arguments, "--checkpoint", "tiny.safetensors", "--categories", "cat") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
