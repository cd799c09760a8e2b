"""Whatever is typed: the help, or one line and exit code 2, soon, and nothing a terminal obeys."""

import contextlib
import io
import os
import re
from pathlib import Path

import pytest
from fuzz.fuzzing import run_cases
from hypothesis import strategies as st

from groundingdino.cli import main as command_line
from groundingdino.cli import operator_report, train

WORDS = {  # beside the options that a command's help names
    "data": ["convert", "check", "show", "split"],
    "train": [*train.FIRST_FLAGS, *train.RENAMED, "refcoco", "--model.name"],
    "prdict": ["--help"],
}
VALUES = (
    *("", "-1", "0", "1e999", "nan", "-inf", "9" * 30, "a", "None", "True", "auto", "max", "fp32", "cuda:99", "tpu"),
    *("\ud800", "\x1b[2J", "é", "a\nb", "\0", "x" * 5000, "%s", "{}", "[]", "0:5", "1:2,3", "~"),
    *("--", "-", "=", "--=", "--no-such", "--help", "-h"),
    *("pipe", "folder", "empty", "text.json", "gone", "/dev/null"),
)
ENDINGS = (0, 1, 2)
CASES = 120


def options_of(command: str) -> list[str]:
    """What its help says, and `WORDS`."""
    page = io.StringIO()
    if command in command_line.COMMANDS:
        with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
            command_line.main([command, "--help"])
    return sorted({*re.findall(r"--[a-z][a-z.-]*[a-z]", page.getvalue()), *WORDS.get(command, ["--help"])})


def command_lines() -> st.SearchStrategy[list[str]]:
    def words(command: str) -> st.SearchStrategy[list[str]]:
        flags, values = st.sampled_from(options[command]), st.one_of(st.sampled_from(VALUES), st.text(max_size=8))
        pair = st.tuples(flags, values).map(list)
        joined = st.tuples(flags, values).map(lambda both: ["=".join(both)])
        parts = st.lists(st.one_of(pair, joined, values.map(lambda value: [value])), max_size=6)
        return parts.map(lambda groups: [command, *(word for group in groups for word in group)])

    options = {command: options_of(command) for command in sorted({*command_line.COMMANDS, *WORDS})}
    return st.sampled_from(sorted(options)).flatmap(words)


@pytest.fixture
def messy_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text.json").write_text("{}")
    monkeypatch.setattr(operator_report, "print_report", lambda device, repeats: 0)  # its arguments are right


def test_it_ends_with_help_or_one_line(
    request: pytest.FixtureRequest, messy_folder: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(arguments: list[str]) -> None:
        try:
            code = command_line.main(arguments)
        except SystemExit as end:
            assert end.code == 0 and any("-h" in argument for argument in arguments)
            return
        finally:
            captured = capsys.readouterr()
        assert code in ENDINGS
        lines = [line for line in captured.err.splitlines() if ": warning: " not in line]
        assert all(character.isprintable() for line in lines for character in line)
        if code == 2:
            assert len(lines) == 1 and captured.err.endswith("\n")

    run_cases(request, command_lines(), check, CASES)
