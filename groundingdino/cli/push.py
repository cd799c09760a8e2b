"""Upload a checkpoint to the Hugging Face hub, with a model card of its figures, licence and provenance.

    groundingdino push runs/refcoco/best.safetensors OWNER/NAME --license apache-2.0 --reports refcoco_val.json

Log in once with `hf auth login`, or set HF_TOKEN. Exit code 2: something that you can fix, in one line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from groundingdino.cli import console, loading


@dataclass(frozen=True)
class Arguments:
    """What to upload, and where to."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """a checkpoint of ours, other weights, or the name of a release"""
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    """where to; it is made if it is not there"""
    license: str = ""
    """as the hub names it, such as apache-2.0; default: for a release, what it was released under"""
    reports: tuple[Path, ...] = ()
    """reports of `groundingdino evaluate`, whose figures go into the card"""
    to: Literal["native", "huggingface"] = "native"
    """native is for `gd.load_model`, huggingface for transformers, which `gd.load_model` reads too"""
    private: bool = False
    """make a repository that only you can see"""


def push(arguments: Arguments) -> int:
    """Upload, and print where it is. The exit code."""
    if arguments.repository.count("/") != 1 or not all(arguments.repository.split("/")):
        raise ValueError(f"{arguments.repository!r} is no repository of the hub: name OWNER/NAME")
    console.require(["huggingface_hub"], "hub")
    from groundingdino.checkpoints.push import PushOptions, push
    from groundingdino.evaluation.report import read_report

    reports = [read_report(path) for path in arguments.reports]
    options = PushOptions(arguments.license, arguments.private, arguments.to, reports)
    print(push(loading.resolved(arguments.checkpoint), arguments.repository, options))
    return 0


def main(arguments: Sequence[str], prog: str = "groundingdino push") -> int:
    """The exit code."""
    return console.run(prog, lambda: push(console.parse(Arguments, arguments, prog, description=__doc__)))
