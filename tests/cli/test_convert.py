"""`groundingdino convert` and its door `convert_checkpoint.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from groundingdino.cli import convert

DOOR = Path(__file__).parents[2] / "convert_checkpoint.py"


def test_the_door_converts_and_reports(golden: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(DOOR), str(golden / "tiny/mmdet_checkpoint.pth"), str(tmp_path / "out.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.safetensors").is_file() and done.stdout.splitlines()[-1].startswith("wrote ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.pth", "out.safetensors"], "gone.pth: no such file"),
        (["pipe.pth", "out.safetensors"], "pipe.pth: a pipe"),
        (["text.pth", "out.safetensors"], "text.pth"),
        (["text.pth", "text.pth"], "is what is read"),
        (["text.pth"], "OUT"),
        (["text.pth", "out.pth", "--to", "onnx"], "--to"),
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
    os.mkfifo("pipe.pth")
    Path("text.pth").write_text("no weights")
    assert convert.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe.pth", "text.pth"]
