"""Checkpoints on their way to the hub: a card that says what they are, and the same weights back."""

import json
from pathlib import Path

import pytest
import torch
from golden_cases import tiny_model
from hub_server import Hub, asked
from safetensors.torch import load_file

from groundingdino import checkpoints
from groundingdino.checkpoints.model_file import SOURCE_KEY, save_detector
from groundingdino.cli.main import main

pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    with asked(tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """Weights that say that they are a release's."""
    path = tmp_path_factory.mktemp("released") / "released.safetensors"
    source = {"naming": "mmdet", "file": "x.pth", "sha256": "1" * 64, "release": "MM-GDINO-T, O365+GoldG"}
    save_detector(path, tiny_model(), {SOURCE_KEY: json.dumps(source)})
    return path


def test_a_pushed_checkpoint_comes_back_by_its_name(hub: Hub, released, capsys):
    assert main(["push", str(released), "me/tiny"]) == 0
    assert capsys.readouterr().out.strip() == f"{hub.url}/me/tiny" and hub.tokens == {"Bearer hf_mine"}
    assert hub.files["me/tiny"].keys() == {"README.md", "model.safetensors"}
    assert checkpoints.resolve("me/tiny").read_bytes() == released.read_bytes()


def test_the_card_has_licence_figures_and_provenance(hub: Hub, released, tmp_path, capsys):
    report = {
        "protocol_name": "refcoco",
        "split": "val",
        "protocol": {"scoring": "max: best token"},
        "figures": {"refcoco P@1": 0.5, "AP": None},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert main(["push", str(released), "me/tiny", "--reports", str(tmp_path / "report.json")]) == 0
    card = hub.files["me/tiny"]["README.md"].decode()
    header = card.split("---")[1]
    assert "license: apache-2.0" in header and "openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg" in header
    assert "| refcoco val | refcoco P@1 | 50.00 |" in card and "max: best token" in card
    assert "| coco val2017 | AP | 50.4 | mmdetection" in card and "Not measured here" in card
    assert '- sha256: "1111' in card and 'gd.load_model("me/tiny")' in card


def test_weights_of_ones_own_are_pushed_without_a_base_model(hub: Hub, tmp_path):
    save_detector(tmp_path / "own.safetensors", tiny_model())
    assert main(["push", str(tmp_path / "own.safetensors"), "me/own", "--license", "mit"]) == 0
    header = hub.files["me/own"]["README.md"].decode().split("---")[1]
    assert "license: mit" in header and "base_model" not in header


def test_a_repository_is_private_where_asked_and_else_as_its_owners_settings_have_it(hub: Hub, released):
    assert main(["push", str(released), "me/mine", "--private"]) == 0
    assert main(["push", str(released), "me/default"]) == 0
    assert hub.visibility == {"me/mine": "private", "me/default": None}


def test_a_folder_for_transformers_can_be_pushed(hub: Hub, released):
    assert main(["push", str(released), "me/theirs", "--to", "huggingface"]) == 0
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= hub.files[
        "me/theirs"
    ].keys()
    assert "library_name: transformers" in hub.files["me/theirs"]["README.md"].decode()
    found, expected = load_file(checkpoints.resolve("me/theirs")), load_file(released)
    assert all(torch.equal(found[name], expected[name]) for name in expected if "label_embedding" not in name)


def test_what_cannot_be_pushed_is_one_line(hub: Hub, released, tmp_path, capsys, monkeypatch):
    own = tmp_path / "own.safetensors"
    save_detector(own, tiny_model())
    for arguments, message in (
        ([str(own), "me/tiny"], "name their licence"),
        ([str(released), "tiny"], "name OWNER/NAME"),
        ([str(released), "not-mine/tiny"], "the hub does not take it"),
        ([str(tmp_path / "gone.safetensors"), "me/tiny"], "no such file"),
    ):
        assert main(["push", *arguments]) == 2
        problem = capsys.readouterr().err
        assert problem.count("\n") == 1 and message in problem
    monkeypatch.setenv("GROUNDINGDINO_OFFLINE", "1")
    asked = len(hub.requests)
    assert main(["push", str(released), "me/tiny"]) == 2 and "forbids the network" in capsys.readouterr().err
    assert len(hub.requests) == asked and not hub.files.get("me/tiny")
