"""What tests of `groundingdino label` start from: images, a film, names, and the command as a user gives it."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
NAMES = """
- {name: animal, prompts: [cat, dog], negatives: [toy]}
- {name: boat, threshold: 0.015}
"""
SMALL = ("--scale", "48", "64", "--device", "cpu", "--threshold", "0.03", "--keep-above", "0.01", "--workers", "0")


def write_images(folder: Path, count: int) -> Path:
    """A folder of noise in two shapes."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number in range(count):
        pixels = rng.integers(0, 255, (48, 64 if number % 3 else 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def write_film(path: Path, frames: int) -> Path:
    """A video that gets brighter by 255 / frames from frame to frame; the test is skipped without PyAV."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            pixels = np.full((48, 64, 3), 255 * number // frames, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def command(*more: str, images: str = "photos") -> list[str]:
    """The program in a process of its own."""
    return [sys.executable, "-m", "groundingdino", "label", *SMALL, "--names", "names.yaml", images, *more]


def environment() -> dict[str, str]:
    """For it."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def records(out: Path) -> int:
    """Bytes of what the workers have found so far."""
    return sum(path.stat().st_size for path in (out / "shards").glob("0*") if path.suffix != ".done")
