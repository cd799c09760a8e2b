"""Images per second of one core, opening a large annotation file, and what a loader worker costs in memory.

python -m benchmarks data [--image PHOTO.jpg] [--entries 1000000]
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from benchmarks.race import row
from groundingdino.data import (
    Augmentation,
    GroundingDataset,
    LoaderOptions,
    TrainingSource,
    TrainLoader,
    build_train_loader,
    load_odvg,
)
from groundingdino.data.augmentation import augment
from groundingdino.inputs.images import collate_images, open_image, to_tensor
from groundingdino.runtime.devices import tune_process

IMAGES_PER_SECOND, OPEN_SECONDS, WORKER_MB = 60, 10, 50  # targets
SIZE = (640, 480)  # COCO's most frequent
CAPTION = "a man in a red shirt holding a cup next to a table"


def photograph(folder: Path, source: Path | None) -> Path:
    """A 640x480 JPEG of quality 90: the given image resized, or smooth noise of about a photograph's file size."""
    if source is not None:
        image = Image.open(source).convert("RGB").resize(SIZE)
    else:
        coarse = np.random.default_rng(0).integers(0, 256, (SIZE[1] // 6, SIZE[0] // 6, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)
    path = folder / "photograph.jpg"
    image.save(path, quality=90)
    return path


def write_annotations(folder: Path, count: int) -> Path:
    """ODVG json lines, two regions each, all of the same image."""
    path = folder / f"{count}.jsonl"
    regions = [
        {"bbox": [17.08, 208.6, 162.25, 263], "phrase": "a man in a red shirt", "tokens_positive": [[0, 20]]},
        {"bbox": [[117.1, 208.6, 262.2, 263], [17, 8.6, 162, 63]], "phrase": "a cup", "tokens_positive": [[29, 34]]},
    ]
    width, height = SIZE
    with path.open("w") as file:
        for number in range(count):
            grounding = {"caption": f"{CAPTION} {number}", "regions": regions}
            line = {"filename": "photograph.jpg", "height": height, "width": width, "grounding": grounding}
            file.write(json.dumps(line) + "\n")
    return path


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median processor time, which other programs on the machine do not lengthen much."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return 1000 * statistics.median(times)


def speed(path: Path, batches: TrainLoader, images: int) -> list[str]:
    """Where the time of a training image goes, and images per second of one core."""
    decoded = to_tensor(open_image(path))
    generator = np.random.default_rng(0)
    views: list[Tensor] = []

    def view() -> None:
        views.append(augment(decoded, torch.zeros(0, 4), Augmentation(), generator).image)

    decode = milliseconds(lambda: to_tensor(open_image(path)), images)
    resize = milliseconds(view, images)
    pairs = iter(zip(views[::2], views[1::2], strict=True))
    normalise = milliseconds(lambda: collate_images(next(pairs)), images // 2) / 2
    iterator = iter(batches)
    for _ in range(images):  # until the heap has grown to what the largest need
        next(iterator)
    begin = time.process_time()
    for _ in range(images // 2):
        next(iterator)
    whole = 1000 * (time.process_time() - begin) / (images // 2 * 2)
    rest = whole - decode - resize - normalise
    parts = f"decode {decode:.1f}, resize and crop {resize:.1f}, normalise and pad {normalise:.1f}, the rest {rest:.1f}"
    kilobytes, per_second = path.stat().st_size // 1024, 1000 / whole
    return [
        row(
            "training images a second and core",
            f"{per_second:.0f}",
            str(IMAGES_PER_SECOND),
            per_second >= IMAGES_PER_SECOND,
        ),
        row(f"milliseconds each (640x480 JPEG of {kilobytes} KB)", f"{whole:.1f}: {parts}"),
    ]


def private_megabytes(pid: int) -> float:
    """Memory that a process shares with no other (Linux)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def worker_megabytes(annotations: Path, folder: Path) -> float:
    """Private memory of one loader worker. Small images, so that pixels do not hide the rest."""
    small = Augmentation((64,), 100, crop_probability=0.0)
    source = TrainingSource(load_odvg(annotations), folder)
    batches = build_train_loader(GroundingDataset([source], small), LoaderOptions(2, workers=1))
    iterator = iter(batches)
    for _ in range(20):
        next(iterator)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return max(private_megabytes(int(child)) for child in children)


def main(image: Path | None = None, entries: int = 1_000_000, images: int = 100) -> None:
    """Measure on this machine.

    Args:
        image: a photograph to use instead of a synthetic one.
        entries: of the annotation file.
        images: that the median is taken over.
    """
    tune_process(torch.device("cpu"))  # as every program of the library does
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = photograph(folder, image)
        few, many = write_annotations(folder, 1000), write_annotations(folder, entries)
        batches = build_train_loader(GroundingDataset([TrainingSource(load_odvg(few), folder)]), LoaderOptions(2))
        print("\n| processor time, one thread | measured | target | |\n|---|---|---|---|")
        print("\n".join(speed(path, batches, images)))
        begin = time.perf_counter()
        load_odvg(many)
        seconds = time.perf_counter() - begin
        name = f"open {entries:,} entries ({many.stat().st_size / 1e6:.0f} MB)"
        print(row(name, f"{seconds:.1f} s", f"{OPEN_SECONDS} s", seconds < OPEN_SECONDS))
        if Path("/proc/self/smaps_rollup").exists():
            base, full = worker_megabytes(few, folder), worker_megabytes(many, folder)
            print(row("memory that a further worker adds", f"{full:.0f} MB", f"{WORKER_MB} MB", full < WORKER_MB))
            print(row("the same with 1,000 entries", f"{base:.0f} MB"))


if __name__ == "__main__":
    tyro.cli(main)
