"""Convert MM-Grounding-DINO weights between mmdet's format, transformers' and ours, strictly and with a report.

    groundingdino convert IN.pth OUT.safetensors              mmdet's, released or left by mmengine's Runner
    groundingdino convert IN.safetensors OUT.pth --to mmdet   back, bit for bit
    groundingdino convert IN.safetensors OUT --to huggingface a folder for transformers, which IN may be too

No pickled code is run, so a file from anywhere may be read.
Exit code 2: something that you can fix, in one line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from groundingdino.cli import console, loading
from groundingdino.runtime.messages import printable


@dataclass(frozen=True)
class Arguments:
    """What to convert into what."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """file to read: IDEA's or mmdet's .pth, a folder of transformers, or a checkpoint of ours"""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """file to write or replace; for huggingface a folder to make"""
    to: Literal["native", "mmdet", "huggingface", "idea"] = "native"
    """format of the target: native is one safetensors file with everything that load_model needs"""
    text_heads: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """attention heads of a BERT of unusual size (default: one per 64 channels, at least 2)"""


def convert(arguments: Arguments) -> int:
    """Convert and print the report. The exit code."""
    if not arguments.source.is_dir():
        loading.regular_file(arguments.source)
    if arguments.target.exists() and arguments.target.samefile(arguments.source):
        raise ValueError(f"{arguments.target} is what is read: name another file to write")
    from groundingdino.checkpoints.convert import convert_file

    report = convert_file(arguments.source, arguments.target, arguments.to, arguments.text_heads)
    print("\n".join(printable(line) for line in report.lines()))
    return 0


def main(arguments: Sequence[str], prog: str = "groundingdino convert") -> int:
    """The exit code."""
    return console.run(prog, lambda: convert(console.parse(Arguments, arguments, prog, description=__doc__)))
