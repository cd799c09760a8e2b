"""The formats, found by what a file or folder holds rather than by its name."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from groundingdino.data.formats import coco, csv_table, cvat, labelme, mdetr, odvg, voc, yolo
from groundingdino.data.formats.files import Sample
from groundingdino.data.formats.record import Reading, ReadOptions


@dataclass(frozen=True)
class Format:
    """How one format is recognised and read."""

    sniff: Callable[[Sample], bool]
    read: Callable[[Path, ReadOptions], Reading]
    splits: Callable[[Path], list[str]] | None = None  # of a data set in one folder; None: it has none of its own


FORMATS = {
    "odvg": Format(odvg.sniff, odvg.read),
    "mdetr": Format(mdetr.sniff, mdetr.read),
    "lvis": Format(coco.sniff_lvis, coco.read_lvis),
    "coco": Format(coco.sniff, coco.read),
    "labelme": Format(labelme.sniff, labelme.read),
    "cvat": Format(cvat.sniff, cvat.read),
    "voc": Format(voc.sniff, voc.read, voc.splits),
    "openimages": Format(csv_table.sniff_openimages, csv_table.read_openimages),
    "csv": Format(csv_table.sniff, csv_table.read),
    "yolo": Format(yolo.sniff, yolo.read, yolo.splits),
}
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}


def find_format(path: Path) -> str | None:
    """The name of the format of a file or folder; None if it is none of ours.

    Raises:
        ValueError: if there is nothing at `path`, or no regular file.
    """
    sample = Sample(path)
    return next((name for name, known in FORMATS.items() if known.sniff(sample)), None)


def read(path: Path, options: ReadOptions | None = None) -> Reading:
    """Annotations of any format as one `Reading`.

    Raises:
        ValueError: naming the path, if it is missing, of no known format, or holds several annotation files.
    """
    found = find_format(path)
    if found is None and path.is_dir():
        inside = _files_of_splits(path)
        if options is not None and options.split in inside:
            return read(inside[options.split], replace(options, split=None))
        if len(inside) == 1:
            return read(next(iter(inside.values())), options)
        if inside:
            raise ValueError(f"{path}: several annotations ({', '.join(inside)}); give one of them, or a split")
    if found is None:
        raise _unknown(path)
    return FORMATS[found].read(path, options or ReadOptions())


def read_splits(path: Path, options: ReadOptions | None = None) -> dict[str, Reading]:
    """The splits of a data set by their names (train, val, test); {"all": ...} where it has none.

    Raises:
        ValueError: naming the path, if it is missing or of no known format.
    """
    options = options or ReadOptions()
    if options.split is not None:
        return {options.split: read(path, options)}
    found = find_format(path)
    if found is not None:
        own = FORMATS[found].splits
        names = own(path) if own is not None else []
        if len(names) > 1:
            return _with_shared_names({name: read(path, replace(options, split=name)) for name in names})
        return {"all": read(path, options)}
    inside = _files_of_splits(path) if path.is_dir() else {}
    if not inside:
        raise _unknown(path)
    return _with_shared_names({name: read(part, options) for name, part in inside.items()})


def _unknown(path: Path) -> ValueError:
    """What is wrong with a damaged JSON document; of anything else, that its format is not known."""
    if path.is_file():
        sample = Sample(path)
        if sample.head.lstrip().startswith(b"{"):
            try:
                sample.parse()
            except ValueError as error:
                return ValueError(f"{path}: {error}")
    return ValueError(f"{path}: no annotations in a known format ({', '.join(FORMATS)})")


def _with_shared_names(splits: dict[str, Reading]) -> dict[str, Reading]:
    """Splits of a format that lists no categories, with the names of all of them, so that numbers mean the same."""
    if len(splits) < 2 or any(reading.declared is not None or reading.is_grounding() for reading in splits.values()):
        return splits
    names = sorted({name for reading in splits.values() for name in reading.categories.values()})
    return {split: replace(reading, declared=dict(enumerate(names))) for split, reading in splits.items()}


def _files_of_splits(folder: Path) -> dict[str, Path]:
    """Folders and files named as splits, in the folder or in its `annotations`."""
    found: dict[str, list[Path]] = {}
    places = [place for place in (folder, folder / "annotations", folder / "mdetr_annotations") if place.is_dir()]
    for place in places:
        for part in sorted(place.iterdir()):
            split = _split_of(part)
            if split is not None and (target := _annotations_in(part)) is not None:
                found.setdefault(split, []).append(target)
    if found:
        found = {split: found[split] for split in SPLIT_NAMES if split in found}
        return {parts[0].stem if len(parts) > 1 else split: parts[0] for split, parts in found.items()} | {
            part.stem: part for parts in found.values() for part in parts[1:]
        }
    known = [part for place in places for part in sorted(place.iterdir()) if _is_annotation_file(part)]
    return {"all": known[0]} if len(known) == 1 else {part.stem: part for part in known}


def _is_annotation_file(part: Path) -> bool:
    if part.suffix not in (".json", ".jsonl", ".csv", ".xml") or part.name.endswith("_label_map.json"):
        return False
    return part.is_file() and find_format(part) is not None


def _split_of(part: Path) -> str | None:
    words = part.stem.lower().replace("-", "_").replace("2017", "").replace("2014", "").split("_")
    return next((split for split, names in SPLIT_NAMES.items() if any(name in words for name in names)), None)


def _annotations_in(part: Path) -> Path | None:
    if part.is_file():
        return part if _is_annotation_file(part) else None
    if find_format(part) is not None:
        return part
    inside = [file for file in sorted(part.iterdir()) if _is_annotation_file(file)]
    return inside[0] if len(inside) == 1 else None


def writable_format(reading: Reading) -> str:
    """The format to write a data set in: its own where we write it, else ODVG for captions and COCO for the rest."""
    if reading.is_grounding():
        return "odvg"
    return reading.format if reading.format in ("coco", "yolo", "voc", "odvg") else "coco"
