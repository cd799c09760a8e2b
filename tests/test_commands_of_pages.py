"""Every command that the README and the pages show is understood by the program that it names."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from groundingdino.cli import console, convert, evaluate, main, train

ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "groundingdino": main.main,
    "train.py": train.main,
    "evaluate.py": evaluate.main,
    "convert_checkpoint.py": convert.main,
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELLS = ("", "sh", "bash", "console")
INLINE = re.compile(r"`([^`\n]+)`")
PLACEHOLDERS = {"...": "", "N": "3", "RANK": "8", "PROTOCOL": "refcoco"}


class UnderstoodError(BaseException):
    """The arguments are fine; the command is not to be run."""


def commands() -> Iterator[tuple[str, str]]:
    """(page, command line) of every line of a block, and of every inline command with a flag."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        blocks = [block.replace("\\\n", " ") for language, block in BLOCK.findall(text) if language in SHELLS]
        lines = [line for block in blocks for line in block.splitlines()]
        lines += [code for code in INLINE.findall(BLOCK.sub("", text)) if " --" in code]
        for line in lines:
            for part in re.split(r"&&|\||;", line.partition(" #")[0]):
                yield page.name, part.strip()


def arguments_of(command: str) -> tuple[str, list[str]] | None:
    """The program and its arguments; None where it is none of ours."""
    try:
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(re.sub(r"[\[\]]", "", command))]
    except ValueError:  # an apostrophe: no command
        return None
    for place, word in enumerate(words):
        name = word.rpartition("/")[2]
        if name in PROGRAMS and (place == 0 or name != "groundingdino" or words[place - 1] == "-m"):
            return name, [word for word in words[place + 1 :] if word]
    return None


COMMANDS = [(page, command) for page, command in dict.fromkeys(commands()) if arguments_of(command)]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_of_a_page_is_understood(page, command, monkeypatch, capsys):
    parse = console.parse

    def understood(*arguments, **options):
        parsed = parse(*arguments, **options)
        if options.get("return_unknown_args"):  # the first half of the work
            return parsed
        raise UnderstoodError

    monkeypatch.setattr(console, "parse", understood)
    name, arguments = arguments_of(command)
    try:
        code = PROGRAMS[name](arguments, name)
    except (UnderstoodError, SystemExit):
        return
    assert code == 0, capsys.readouterr().err
