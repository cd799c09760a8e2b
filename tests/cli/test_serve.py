"""`groundingdino serve`: what it checks before it loads anything. What it serves: tests/integrations/test_server.py."""

import socket

import pytest
from golden_cases import tiny_model
from training_runs import free_port

from groundingdino.checkpoints.model_file import save_detector
from groundingdino.cli import serve


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_detector(path, tiny_model())
    return path


def test_what_cannot_be_served_is_one_line(checkpoint, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for arguments, message in [
            (["--port", taken.getsockname()[1]], "cannot listen at 127.0.0.1:"),
            (["--port", free_port(), "--batch", 0], "--batch 0: more than 0"),
            (["--port", free_port(), "--seconds", -1], "--seconds -1.0: more than 0"),
            (["--port", free_port(), "--checkpoint", "gone"], "gone"),
        ]:
            assert serve.main([str(word) for word in ["--checkpoint", checkpoint, *arguments]]) == 2
            error = capsys.readouterr().err
            assert message in error and error.count("\n") == 1
