"""`groundingdino demo`: what it checks before it loads anything, and what it serves."""

import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from golden_cases import tiny_model
from training_runs import environment, free_port, obey_ctrl_c

from groundingdino.checkpoints.model_file import save_detector
from groundingdino.cli import demo, demo_page
from groundingdino.cli.demo_page import LARGEST_UPLOAD


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_detector(path, tiny_model())
    return path


def run(*arguments):
    return demo.main([str(argument) for argument in arguments])


def test_it_serves_a_page_of_the_checkpoints_model_where_it_was_told_to(checkpoint, tmp_path, monkeypatch):
    built, launched, port = [], [], free_port()

    class Page:
        def launch(self, **options):
            launched.append(options)

    monkeypatch.setattr(
        demo_page, "build_page", lambda predictor, samples, _: built.append((predictor, samples)) or Page()
    )
    assert run("--checkpoint", checkpoint, "--samples", tmp_path, "--port", port, "--precision", "bf16") == 0
    ((predictor, samples),) = built
    assert predictor.model.config.name == "tiny" and samples == tmp_path
    assert next(predictor.model.parameters()).dtype == torch.bfloat16
    limits = {"max_file_size": LARGEST_UPLOAD}
    assert launched == [{"server_name": "127.0.0.1", "server_port": port, **limits}]


def test_an_address_where_nothing_can_listen_is_one_line(checkpoint, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for host, port, message in [
            ("127.0.0.1", taken.getsockname()[1], "cannot listen at 127.0.0.1:"),
            ("127.0.0.1", 70000, "ports go from 1 to 65535"),
            ("127.0.0.1", 0, "ports go from 1 to 65535"),
            ("203.0.113.1", free_port(), "cannot listen at 203.0.113.1:"),
        ]:
            assert run("--checkpoint", checkpoint, "--host", host, "--port", port) == 2
            error = capsys.readouterr().err
            assert message in error and error.count("\n") == 1


def test_a_checkpoint_or_samples_that_are_not_there_are_one_line(checkpoint, tmp_path, capsys):
    for arguments in (["--checkpoint", "gone"], ["--checkpoint", checkpoint, "--samples", tmp_path / "gone"]):
        assert run(*arguments, "--port", free_port()) == 2
        error = capsys.readouterr().err
        assert "gone" in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_without_a_traceback(checkpoint, sent):
    pytest.importorskip("gradio")
    port = free_port()
    command = [sys.executable, "-m", "groundingdino", "demo", "--checkpoint", str(checkpoint), "--port", str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment(), preexec_fn=obey_ctrl_c, **pipes)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.5)
        time.sleep(1)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (0, 130) and "Traceback" not in errors, errors
