"""Convert MM-Grounding-DINO weights, strictly and with a report.

    python convert_checkpoint.py IN.pth OUT.safetensors            # mmdet's, released or left by mmengine's Runner
    python convert_checkpoint.py IN.safetensors OUT.pth --to mmdet  # back, bit for bit
    python convert_checkpoint.py IN.safetensors OUT --to huggingface  # a folder for transformers, which IN may be too

No pickled code is run, so a file from anywhere may be read.
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from groundingdino.checkpoints.convert import Target, convert_file


def main(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    to: Target = "native",
    text_heads: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
) -> None:
    """Convert MM-Grounding-DINO weights between mmdet's format, transformers' and ours.

    Args:
        source: file to read: mmdet's .pth, a folder of transformers' MMGroundingDinoForObjectDetection, or ours.
        target: file to write or replace; for huggingface a folder to make.
        to: format of the target: native is one safetensors file with everything that load_model needs.
        text_heads: attention heads of a BERT of unusual size (default: one per 64 channels, at least 2).
    """
    try:
        report = convert_file(source, target, to, text_heads)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(report.lines()))


if __name__ == "__main__":
    tyro.cli(main)
