"""Splitting a data set by image, each category in proportion, the same way every time."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from groundingdino.data.formats import registry
from groundingdino.data.formats.record import AnnotatedImage, Reading, ReadOptions
from groundingdino.data.formats.writers import WRITERS, PlaceImages, Written

NAMES = {1: ("train",), 2: ("train", "val"), 3: ("train", "val", "test")}


@dataclass(frozen=True)
class SplitPlan:
    """Which part of a data set each of its images belongs to."""

    names: tuple[str, ...]
    part_of: dict[str, int]  # file name -> index into `names`


def plan(reading: Reading, shares: Sequence[float], seed: int = 0) -> SplitPlan:
    """Distribute images (with all their entries) over parts, as even as can be per category.

    The rarest category is dealt first, each of its images to the part that still wants most of that category
    (iterative stratification, Sechidis et al. 2011). The same images and seed give the same parts, in any order of
    the file.

    Args:
        reading: a data set.
        shares: of the parts: one to three positive numbers, of which the sum is 1.
        seed: decides among equals.
    Raises:
        ValueError: if the shares are none.
    """
    if len(shares) not in NAMES or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares {' '.join(map(str, shares))}: expected one to three positive numbers that sum to 1")
    names_of: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in reading:
        if entry.usable:
            named = [thing.name for thing in entry.objects] if entry.caption is None else []
            names_of[entry.file_name].update(named)
    files = sorted(names_of)
    random.Random(seed).shuffle(files)
    images_of: dict[str, list[str]] = defaultdict(list)
    for file in files:
        for name in names_of[file]:
            images_of[name].append(file)
    wanted = {name: [share * len(images) for share in shares] for name, images in images_of.items()}
    room = [share * len(files) for share in shares]
    part_of: dict[str, int] = {}

    def give(file: str, part: int) -> None:
        part_of[file] = part
        room[part] -= 1
        for name in names_of[file]:
            wanted[name][part] -= 1

    remaining = {name: len(images) for name, images in images_of.items()}
    for name in sorted(images_of, key=lambda name: (remaining[name], name)):
        for file in images_of[name]:
            if file not in part_of:
                give(file, max(range(len(shares)), key=lambda part: (wanted[name][part], room[part])))
    for file in files:
        if file not in part_of:  # without boxes, or captions alone
            give(file, max(range(len(shares)), key=lambda part: room[part]))
    return SplitPlan(NAMES[len(shares)], part_of)


def split(
    source: Path,
    shares: Sequence[float],
    target: Path,
    options: ReadOptions | None = None,
    seed: int = 0,
) -> Written:
    """Write the parts of a data set into `target`, in its own format where we write it, else in COCO's or ODVG's.

    Args:
        source: file or folder of any format.
        shares: see `plan`.
        target: folder.
        options: how `source` is read.
        seed: see `plan`.
    Raises:
        ValueError: if there is no data set, it has splits already, or the shares are none.
    """
    splits = registry.read_splits(source, options)
    if len(splits) > 1:
        raise ValueError(f"{source}: split already ({', '.join(splits)}); choose one of them to split further")
    (reading,) = splits.values()
    parts = part(reading, shares, seed)
    to = registry.writable_format(reading)
    place: PlaceImages = "link" if to in ("yolo", "voc") else "leave"
    return WRITERS[to](parts, target, place)


def part(reading: Reading, shares: Sequence[float], seed: int = 0) -> dict[str, Reading]:
    """The parts of a data set by name (train, val, test), with the same categories; see `plan`."""
    planned = plan(reading, shares, seed)
    declared = None if reading.is_grounding() else reading.categories
    return {
        name: replace(reading, declared=declared, entries=_part(reading, planned, number))
        for number, name in enumerate(planned.names)
    }


def _part(reading: Reading, planned: SplitPlan, number: int) -> Callable[[], Iterator[AnnotatedImage]]:
    def entries() -> Iterator[AnnotatedImage]:
        return (entry for entry in reading if planned.part_of.get(entry.file_name) == number)

    return entries
