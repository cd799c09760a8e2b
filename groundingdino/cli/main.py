"""The console script `groundingdino`, also `python -m groundingdino`: one subcommand a module of this folder.

A subcommand is a row of `COMMANDS` and a module of that name with `main(arguments, prog) -> exit code`. Only the module
of the command that was asked for is imported, and torch only once its arguments have been understood.
"""

import importlib
import sys
from collections.abc import Sequence

import groundingdino
from groundingdino.cli import console

COMMANDS = {
    "train": "train a model; `train quickstart` needs no data",
    "evaluate": "measure a checkpoint on annotated images",
    "predict": "find things in images",
    "label": "label any number of images",
    "demo": "try a checkpoint in the browser",
    "serve": "answer over HTTP",
    "export": "write a model as ONNX",
    "convert": "convert weights between formats",
    "merge": "average checkpoints of one model",
    "info": "say what a checkpoint is",
    "models": "list the released checkpoints",
    "push": "upload a checkpoint to the Hugging Face hub",
    "data": "work on annotation files",
    "selfcheck": "check the operators on this machine",
    "report": "collect what a bug report needs",
}
PURPOSE = "MM-Grounding-DINO: find in images what words describe."


def main(arguments: Sequence[str] | None = None, prog: str = "groundingdino") -> int:
    """Run the subcommand that `arguments` (default: the command line's) name. The exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in COMMANDS:
        return int(importlib.import_module(f"groundingdino.cli.{name}").main(rest, f"{prog} {name}"))
    if name == "--version":
        print(f"groundingdino {groundingdino.__version__}")
        return 0
    return console.answer_without_command(prog, name, COMMANDS, PURPOSE)
