"""What long campaigns found, and was fixed: each case once more."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz.fuzzing import limits, outcome
from fuzz.small_files import small_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from training_runs import scenes, small_config

from groundingdino.checkpoints import run_state
from groundingdino.checkpoints.convert import convert_file
from groundingdino.data.formats.files import read_yaml
from groundingdino.data.formats.record import ReadOptions
from groundingdino.data.formats.registry import read_splits
from groundingdino.data.image_checks import examine
from groundingdino.inference.predictor import load_model
from groundingdino.inputs.images import open_image
from groundingdino.training.resume import load_state
from groundingdino.training.trainer import fit


def test_a_dds_file_of_128_bytes_that_names_a_hundred_million_pixels(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "dds")
    content = bytearray(stream.getvalue()[:128])
    content[12:20] = struct.pack("<2I", 10_000, 10_000)
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with limits():
        with pytest.raises(ValueError, match="not a readable image"):
            open_image(path)
        assert examine(path).error


@pytest.mark.parametrize("text", ["[" * 2000, "nc: " + "[" * 2000, "{a: " * 2000])
def test_yaml_that_is_nested_deep(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(text)
    with limits(), pytest.raises(ValueError, match="nested over 50 deep"):
        read_yaml(path)


def test_a_file_of_names_whose_name_is_too_long(tmp_path: Path) -> None:
    (tmp_path / "obj.data").write_text(f"classes = 2\ntrain = train.txt\nnames = {'x' * 5000}\n")
    with pytest.raises(ValueError, match="no category names"):
        read_splits(tmp_path, ReadOptions(images=tmp_path))


def test_a_checkpoint_whose_name_a_terminal_obeys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("\x92", "\x1b[2J", "a\x9b.pth"):
        assert outcome(lambda name=name: load_model(name)) is None


@pytest.mark.parametrize("part", ["config", "model_config"])
def test_a_training_state_with_a_tensor_among_its_settings(tmp_path: Path, part: str) -> None:
    config = small_config(scenes(tmp_path / "data"), tmp_path / "run", epochs=1)
    fit(config)
    path = tmp_path / "run" / "last.state"
    state = run_state.load_state(path)
    state[part][next(iter(state[part]))] = torch.zeros(0)
    run_state.save_state(path, state)
    with pytest.raises(ValueError, match="not a whole training state"):
        load_state(path)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("downsample.reduction.weight", lambda tensor: tensor.to(torch.float8_e4m3fn), "1 weights are not float64, 32"),
        ("attention.self.key.bias", lambda tensor: tensor[0], r"value of .* do not go together: \(\d+,\) .*, \(\) "),
        ("attention.self.key.bias", lambda tensor: tensor[None], "query, key and value of .* do not go together: "),
        ("attention.self.key.bias", lambda tensor: tensor.bool(), "query, key and value of .* do not go together: "),
    ],
)
def test_a_weight_that_cannot_be_put_in_its_place(tmp_path: Path, part: str, change: Callable, message: str) -> None:
    path = small_checkpoint(tmp_path).with_suffix(".pth")
    content = torch.load(path, weights_only=True)
    name = next(name for name in content["state_dict"] if name.endswith(part))
    content["state_dict"][name] = change(content["state_dict"][name])
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        convert_file(path, tmp_path / "b.safetensors")


def test_a_training_state_that_names_a_larger_model_takes_no_memory_for_it(tmp_path: Path) -> None:
    config = small_config(scenes(tmp_path / "data"), tmp_path / "run", epochs=1, resume="auto")
    fit(config)
    path = tmp_path / "run" / "last.state"
    state = run_state.load_state(path)
    state["model_config"]["text"] |= {"vocabulary": 1_000_000, "width": 2048}
    run_state.save_state(path, state)
    with limits(), pytest.raises(ValueError, match="the state belongs to another model: model: .*text_encoder"):
        fit(config)


def test_a_folder_of_transformers_whose_levels_have_no_axis(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path).with_name("theirs")
    weights = load_file(folder / "model.safetensors")
    weights["model.level_embed"] = weights["model.level_embed"][0, 0].clone()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="level_embed"):
        convert_file(folder, tmp_path / "b.safetensors")
