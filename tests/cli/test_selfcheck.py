"""The report to run first on a new machine."""

import pytest
import torch

from groundingdino.cli import operator_report, selfcheck
from groundingdino.ops import ms_deform_attn_reference


def test_the_report_has_versions_path_accuracy_and_time(capsys, monkeypatch):
    monkeypatch.delenv("GROUNDINGDINO_KERNELS", raising=False)
    monkeypatch.setattr(operator_report, "ENCODER", (((4, 5), (2, 3)), 8, 32, 4))
    assert selfcheck.main(["--device", "cpu", "--repeats", "1"]) == 0
    report = capsys.readouterr().out
    assert f"torch {torch.__version__}" in report and "device cpu" in report and "path: " in report
    assert report.count("  ok") == len(operator_report.CASES) and "forward and backward" in report


def test_a_wrong_operator_is_found(capsys, monkeypatch):
    def shifted(value, shapes, locations, weights):
        return ms_deform_attn_reference(value, shapes, locations.flip(-1), weights)

    monkeypatch.setattr(operator_report, "ms_deform_attn", shifted)
    assert selfcheck.main(["--device", "cpu", "--repeats", "0"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_the_composite_is_named_where_it_was_asked_for(monkeypatch):
    monkeypatch.setenv("GROUNDINGDINO_KERNELS", "off")
    assert operator_report.path_line(torch.device("cpu")) == "path: grid_sample, because GROUNDINGDINO_KERNELS says off"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_a_device_that_cannot_be_used_is_one_line(capsys):
    assert selfcheck.main(["--device", "cuda"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
