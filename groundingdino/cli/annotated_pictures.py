"""Annotated pictures of a data set: `groundingdino data show`."""

import random
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image

from groundingdino.data.formats.record import AnnotatedImage, Reading
from groundingdino.inference.visualize import draw_detections, tile
from groundingdino.inputs.images import load_image
from groundingdino.structures import Detections

CELL = 480  # pixels of the longer side of a picture in the grid
Chosen = tuple[Reading, AnnotatedImage]


def draw_grid(readings: Iterable[Reading], path: Path, count: int, columns: int, seed: int) -> int:
    """Save one picture of `count` annotated images, `columns` in a row. The number of images."""
    pictures = [_draw(reading, entry, CELL) for reading, entry in _choose(readings, count, seed)]
    tile(pictures, columns).save(path)
    return len(pictures)


def draw_into(readings: Iterable[Reading], folder: Path, count: int, seed: int) -> int:
    """Save `count` annotated images as pictures of a folder, 001_NAME.png, ... The number of images."""
    chosen = _choose(readings, count, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (reading, entry) in enumerate(chosen, start=1):
        _draw(reading, entry).save(folder / f"{number:03d}_{Path(entry.file_name).stem}.png")
    return len(chosen)


def _choose(readings: Iterable[Reading], count: int, seed: int) -> list[Chosen]:
    """A random part of all usable entries, each as likely as any other, without holding them all."""
    if count < 1:
        raise ValueError(f"count {count}: draw at least one image")
    generator, chosen, seen = random.Random(seed), list[Chosen](), 0
    for reading in readings:
        for entry in reading:
            if entry.usable:
                seen += 1
                place = len(chosen) if len(chosen) < count else generator.randrange(seen)
                if place < count:
                    chosen[place : place + 1] = [(reading, entry)]
    if not chosen:
        raise ValueError("no usable entry to draw")
    return chosen


def _draw(reading: Reading, entry: AnnotatedImage, longest: int | None = None) -> Image.Image:
    image = load_image(reading.images / entry.file_name)
    ratio = min(1.0, longest / max(image.size)) if longest else 1.0
    if ratio < 1:
        image = image.resize((max(1, round(image.width * ratio)), max(1, round(image.height * ratio))))
    count = len(entry.objects)
    return draw_detections(
        image,
        Detections(
            torch.tensor([thing.box for thing in entry.objects]).reshape(-1, 4) * ratio,
            torch.ones(count),
            torch.zeros(count, dtype=torch.int64),
            tuple(thing.name for thing in entry.objects),
        ),
        scores=False,
    )
