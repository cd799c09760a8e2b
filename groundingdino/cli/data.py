"""Work on annotation files: `groundingdino data COMMAND`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from groundingdino.cli import console, loading

SHOWN = 10  # notes about what was left out


@dataclass(frozen=True)
class Convert:
    """Convert an MDETR annotation file to ODVG json lines, the format that training data is often kept in.

    The lines equal those of mmdet's tools/dataset_converters/refcoco2odvg.py.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """such as finetune_refcoco_train.json"""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """the file to write or replace, such as finetune_refcoco_train_vg.json"""


def convert(arguments: Convert) -> int:
    """Write the file, and say what was left out. The exit code."""
    source, target = arguments.source, arguments.target
    if not source.is_dir():
        loading.regular_file(source)
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is what is read: name another file to write")
    from groundingdino.data.convert import convert_file

    written, notes = convert_file(source, target)
    for note in notes[:SHOWN]:
        print(f"left out: {console.printable(note)}")
    print(f"{written} lines written to {target}; {len(notes)} boxes or entries left out")
    return 0


# name -> (arguments, what runs with them, one line of help)
COMMANDS: dict[str, tuple[type, Callable[..., int], str]] = {
    "convert": (Convert, convert, "MDETR json -> ODVG json lines"),
}


def main(arguments: Sequence[str], prog: str = "groundingdino data") -> int:
    """Run the command that `arguments` name. The exit code."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name not in COMMANDS:
        summaries = {command: summary for command, (_, _, summary) in COMMANDS.items()}
        return console.answer_without_command(prog, name, summaries, "Work on annotation files.")
    form, command, _ = COMMANDS[name]
    prog = f"{prog} {name}"
    return console.run(prog, lambda: command(console.parse(form, rest, prog)))
