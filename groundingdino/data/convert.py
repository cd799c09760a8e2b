"""From any annotation format to COCO, YOLO, Pascal VOC or ODVG."""

from pathlib import Path
from typing import Literal

from groundingdino.data.formats import registry
from groundingdino.data.formats.record import ReadOptions
from groundingdino.data.formats.writers import NEED_IMAGES, WRITERS, PlaceImages, Written

TargetFormat = Literal["coco", "yolo", "voc", "odvg"]


def convert(
    source: Path,
    target: Path,
    to: TargetFormat,
    options: ReadOptions | None = None,
    place_images: PlaceImages | None = None,
) -> Written:
    """Read a data set of any format and write it in another; each file appears whole or not at all.

    To ODVG equal to mmdet's `tools/dataset_converters` (coco2odvg, lvis2odvg, goldg2odvg, refcoco2odvg,
    openimages2odvg). Entries and boxes that cannot be used are left out and noted.

    Args:
        source: file or folder; its format is found by what it holds.
        target: folder to write into; of one split also a .json or .jsonl file.
        to: the format.
        options: how `source` is read.
        place_images: whether images are left where they are, linked or copied into `target`; None links them for
            layouts that need it (YOLO, VOC) and leaves them for the others.
    Raises:
        ValueError: if `source` is missing, of no known format or without usable entries, or `target` is what is read.
    """
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is what is read: name another place to write to")
    splits = registry.read_splits(source, options)
    empty = [split for split, reading in splits.items() if not any(entry.usable for entry in reading)]
    if empty:
        problem = next((p for entry in splits[empty[0]] for p in entry.problems), "")
        raise ValueError(f"{source}: no usable entry{'' if empty == ['all'] else f' in {empty[0]}'} ({problem})")
    return WRITERS[to](splits, target, place_images or ("link" if to in NEED_IMAGES else "leave"))


def convert_file(source: Path, target: Path) -> tuple[int, list[str]]:
    """Write an ODVG file from one split of any format.

    Returns:
        The number of lines written, and what was left out, one line each.
    Raises:
        ValueError: if `source` is missing or of no known format.
    """
    reading = registry.read(source)
    written = WRITERS["odvg"]({"all": reading}, target, "leave")
    return written.counts["all"], list(map(str, written.problems))
