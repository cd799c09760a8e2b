"""Time and peak memory of loading a checkpoint of ours, in a fresh process.

python benchmarks/load_checkpoint.py MODEL.safetensors
"""

import resource
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from groundingdino.checkpoint import load_detector
from groundingdino.model import build_detector  # noqa: F401  (timm's import is not part of what is measured)


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(path: Annotated[Path, tyro.conf.Positional], /) -> None:
    """Load it once and print seconds, and memory as a multiple of the file's size."""
    before, started = peak_bytes(), time.perf_counter()
    model = load_detector(path)
    seconds, size = time.perf_counter() - started, path.stat().st_size
    added = peak_bytes() - before
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{count:,} parameters, file {size / 1e6:,.0f} MB: loaded in {seconds:.2f} s, {added / 1e6:,.0f} MB of memory "
        f"({added / size:.2f} x the file; the process with torch alone: {before / 1e6:,.0f} MB)"
    )


if __name__ == "__main__":
    tyro.cli(main)
