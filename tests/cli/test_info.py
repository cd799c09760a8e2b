"""`groundingdino info`."""

import json
import os

import pytest
from golden_cases import tiny_model

from groundingdino.checkpoints.model_file import save_detector
from groundingdino.cli import main as command_line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    provenance = {"file": "mmdet_checkpoint.pth", "note": "\x1b]0;owned\x07\x1b[2J\nfile: a lie"}
    save_detector(path, tiny_model(), {"groundingdino.source": json.dumps(provenance), "ti\x1btle": "\x9b31m"})
    return path


def run(*arguments):
    return command_line.main([str(argument) for argument in arguments])


def test_info_says_size_provenance_and_config(checkpoint, capsys):
    assert run("info", checkpoint) == 0
    text = capsys.readouterr().out
    assert f"{checkpoint.stat().st_size:,}" in text and "file: mmdet_checkpoint.pth" in text and "name: tiny" in text
    parameters = sum(tensor.numel() for tensor in tiny_model().state_dict().values())
    assert f"parameters: {parameters:,}" in text
    assert run("info", checkpoint, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == parameters and facts["config"]["num_queries"] == 60


def test_what_a_file_says_of_itself_cannot_steer_the_terminal(checkpoint, capsys):
    for arguments in ((), ("--json",)):
        assert run("info", checkpoint, *arguments) == 0
        text = capsys.readouterr().out
        assert "owned" in text
        assert all(character.isprintable() for line in text.splitlines() for character in line)
        assert not any(line.strip() == "file: a lie" for line in text.splitlines())


@pytest.mark.parametrize("what", ["nothing", "folder", "pipe"])
def test_what_is_no_file_is_one_line(tmp_path, capsys, what):
    path = tmp_path / "x.safetensors"
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    assert run("info", path) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1
