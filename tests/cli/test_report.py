"""The archive for a bug report."""

import json
import os
import socket
import zipfile

import pytest

from groundingdino.cli import operator_report
from groundingdino.cli.main import main


def test_the_archive_has_the_check_and_the_run_and_no_private_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(operator_report, "ENCODER", (((4, 5), (2, 3)), 8, 32, 4))
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setenv("HOME", str(tmp_path / "own"))
    monkeypatch.setenv("MASTER_ADDR", "trainer7")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs"
    (run / "profile" / "card").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"run_dir": str(run), "init_from": str(tmp_path / "own/secret.pth")}))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (run / "environment.json").write_text(f'{{"by": "somebody@{socket.gethostname()}", "to": "trainer7 192.168.0.9"}}')
    (run / "profile" / "card" / "op_statistic.csv").write_text("OP Type,Count\nMatMul,3\n")
    (run / "final.safetensors").write_bytes(b"weights")
    assert main(["report", "--run-dir", "runs", "--device", "cpu", "--repeats", "0"]) == 0
    assert "wrote groundingdino-report.zip" in capsys.readouterr().out
    with zipfile.ZipFile("groundingdino-report.zip") as archive:
        content = {name: archive.read(name).decode() for name in archive.namelist()}
    assert {"selfcheck.txt", "environment.json", "run/config.json", "run/metrics.jsonl"} <= content.keys()
    assert "run/profile/op_statistic.csv" in content and not any("safetensors" in name for name in content)
    everything = "\n".join(content.values())
    for private in (str(tmp_path), "somebody", socket.gethostname(), "trainer7", "192.168.0.9", os.sep + "own"):
        assert private not in everything, private
    assert "error relative to the composite" in content["selfcheck.txt"]


def test_a_run_folder_that_is_not_there_is_one_line(capsys):
    assert main(["report", "--run-dir", "nowhere", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("text", ["3", "5:5", "0:3", "a:b"])
def test_steps_to_profile_are_two_numbers(text):
    from groundingdino.training.profiling import steps_of

    with pytest.raises(ValueError, match="such as 10:13"):
        steps_of(text)
