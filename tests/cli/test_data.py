"""`groundingdino data`."""

from pathlib import Path

import pytest

from groundingdino.cli import data

ANNOTATIONS = Path(__file__).parent.parent / "golden" / "data" / "mdetr_annotations"
MDETR = ANNOTATIONS / "finetune_refcoco_train.json"


def test_convert_writes_mmdets_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["convert", str(MDETR), str(tmp_path / "vg.json")]) == 0
    assert (tmp_path / "vg.json").read_text() == (ANNOTATIONS / "finetune_refcoco_train_vg.json").read_text()
    assert "41 lines written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a command (convert"),
        (["convrt"], "no command 'convrt' (perhaps convert?)"),
        (["convert", "gone.json", "x.json"], "gone.json does not exist"),
        (["convert", str(MDETR), str(MDETR)], "is what is read"),
        (["convert", str(MDETR)], "OUT"),
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
    assert data.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not list(tmp_path.iterdir())
