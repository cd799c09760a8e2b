"""Convert MM-Grounding-DINO weights, strictly and with a report.

    python convert_checkpoint.py IN.pth OUT.safetensors            # mmdet's, released or left by mmengine's Runner
    python convert_checkpoint.py IN.safetensors OUT.pth --to mmdet  # back, bit for bit

No pickled code is run, so a file from anywhere may be read.
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from groundingdino.converter import Target, convert_file


def main(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    to: Target = "native",
    text_heads: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
) -> None:
    """Convert MM-Grounding-DINO weights between mmdet's format and ours.

    Args:
        source: file to read: mmdet's .pth or ours.
        target: file to write or replace.
        to: format of the target: native is safetensors with everything that load_model needs.
        text_heads: attention heads of a BERT of unusual size (default: one per 64 channels, at least 2).
    """
    try:
        report = convert_file(source, target, to, text_heads)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(report.lines()))


if __name__ == "__main__":
    tyro.cli(main)
