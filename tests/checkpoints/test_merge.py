"""Averages of checkpoints: exact at both ends, between them in between, and only of one model."""

import json

import pytest
import torch
from golden_cases import tiny_model

from groundingdino.checkpoints.merge import interpolate, merge
from groundingdino.checkpoints.model_file import SCALE_KEY, SOURCE_KEY, load_detector, read_metadata, save_detector
from groundingdino.cli.merge import main as merge_command
from groundingdino.config import quickstart_model
from groundingdino.model import build_detector


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    model = tiny_model()
    save_detector(folder / "a.safetensors", model, {SOURCE_KEY: json.dumps({"release": "A"}), SCALE_KEY: "[400, 600]"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    save_detector(folder / "b.safetensors", model)
    return folder / "a.safetensors", folder / "b.safetensors"


def test_the_ends_are_the_checkpoints_themselves_and_the_middle_is_the_mean(pair, tmp_path):
    first, second = (load_detector(path).state_dict() for path in pair)
    for alpha, expected in (
        (0.0, first),
        (1.0, second),
        (0.5, {name: (first[name] + second[name]) / 2 for name in first}),
    ):
        merge(pair, tmp_path / "m.safetensors", [1 - alpha, alpha])
        found = load_detector(tmp_path / "m.safetensors").state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected), alpha


def test_a_mixture_is_exact_at_both_ends_however_far_apart_they_are():
    generator = torch.Generator().manual_seed(0)
    base, tuned = ({"w": torch.randn(1000, generator=generator) * scale} for scale in (1e3, 1e-3))
    assert torch.equal(interpolate(base, tuned, 0.0)["w"], base["w"])
    assert torch.equal(interpolate(base, tuned, 1.0)["w"], tuned["w"])
    torch.testing.assert_close(interpolate(base, tuned, 0.25)["w"], 0.75 * base["w"] + 0.25 * tuned["w"])


def test_where_the_parts_came_from_is_kept(pair, tmp_path):
    merge(pair, tmp_path / "m.safetensors", [0.25, 0.75])
    metadata = read_metadata(tmp_path / "m.safetensors")
    assert metadata[SCALE_KEY] == "[400, 600]"
    assert json.loads(metadata[SOURCE_KEY])["merged"] == [
        {"file": "a.safetensors", "weight": 0.25, "source": {"release": "A"}},
        {"file": "b.safetensors", "weight": 0.75, "source": {}},
    ]


def test_other_models_and_other_sums_are_refused(pair, tmp_path):
    save_detector(tmp_path / "other.safetensors", build_detector(quickstart_model()))
    with pytest.raises(ValueError, match="is of another size than"):
        merge([pair[0], tmp_path / "other.safetensors"], tmp_path / "m.safetensors", [0.5, 0.5])
    with pytest.raises(ValueError, match="summing to 1"):
        merge(pair, tmp_path / "m.safetensors", [0.5, 0.6])


def test_the_command_mixes_and_answers_in_one_line(pair, tmp_path, capsys):
    target = tmp_path / "m.safetensors"
    assert merge_command([*map(str, pair), str(target), "--alpha", "0.5"]) == 0 and target.exists()
    assert "0.5 x" in capsys.readouterr().out
    for wrong in (
        [str(pair[0]), str(target)],
        [*map(str, pair), str(pair[1])],
        [*map(str, pair), str(target), "--alpha", "2"],
    ):
        assert merge_command(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1
