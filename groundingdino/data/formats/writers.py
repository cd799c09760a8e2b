"""Writing data sets: COCO, YOLO, Pascal VOC and ODVG, from the entries of any format, each file atomically."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec

from groundingdino.data.formats import coco, odvg, voc, yolo
from groundingdino.data.formats.record import CROWD, AnnotatedImage, Kind, Problem, Reading
from groundingdino.runtime.files import atomic_file

PlaceImages = Literal["leave", "link", "copy"]
ALL = "all"  # the name of the one split of a data set that has none


@dataclass
class Written:
    """What became of a data set."""

    counts: dict[str, int] = field(default_factory=dict)  # split -> images, or captions of grounding data
    objects: int = 0
    problems: list[Problem] = field(default_factory=list)  # what was left out, and why
    files: list[Path] = field(default_factory=list)  # those that name the data set; not every label file


def write_coco(splits: Mapping[str, Reading], target: Path, place_images: PlaceImages) -> Written:
    """A json file per split: `target` itself if it is one and ends in .json, else `target`/SPLIT.json."""
    written = Written()
    for split, reading in splits.items():
        path = _file_of_split(splits, split, target, ".json")
        entries = list(_one_per_image(reading, split, written))
        _save(path, msgspec.json.encode(coco.encode(reading, entries)), written)
        _place(entries, reading, path.parent / "images", place_images, written)
    return written


def write_odvg(splits: Mapping[str, Reading], target: Path, place_images: PlaceImages) -> Written:
    """A file of json lines per split, as mmdet's converters write it, and a label map beside it for detection data."""
    written = Written()
    for split, reading in splits.items():
        path = _file_of_split(splits, split, target, ".jsonl")
        grounding = reading.is_grounding()
        label_of = None if grounding else odvg.label_function(reading)
        without = odvg.flags_left_out(reading.format)
        entries = []
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            for entry in _usable(reading, split, written):
                _note_left_out(entry, without, written)
                file.write(odvg.dumps(odvg.encode(entry, label_of, without)) + b"\n")
                if place_images != "leave":
                    entries.append(entry)
        written.files.append(path)
        if not grounding:
            names = {str(label): name for label, name in odvg.label_map_of(reading).items()}
            _save(odvg.map_path(path, path.name.split(".")[0]), odvg.dumps(names), written)
        _place(entries, reading, path.parent / "images", place_images, written)
    return written


def write_voc(splits: Mapping[str, Reading], target: Path, place_images: PlaceImages) -> Written:
    """VOC's layout: Annotations, ImageSets/Main/SPLIT.txt, and JPEGImages unless images are left where they are."""
    written = Written()
    (target / "Annotations").mkdir(parents=True, exist_ok=True)
    for split, reading in splits.items():
        stems = []
        entries = list(_one_per_image(reading, split, written))
        for entry in entries:
            stems.append(str(Path(entry.file_name).with_suffix("")).strip("/").replace("/", "_"))
            with atomic_file(target / "Annotations" / f"{stems[-1]}.xml") as file:
                file.write(voc.encode(entry))
        name = "trainval" if split == ALL else split
        _save(target / "ImageSets" / "Main" / f"{name}.txt", "".join(f"{stem}\n" for stem in stems).encode(), written)
        _place(entries, reading, target / "JPEGImages", place_images, written)
    return written


def write_yolo(splits: Mapping[str, Reading], target: Path, place_images: PlaceImages) -> Written:
    """ultralytics' layout: data.yaml, labels/SPLIT/*.txt and images/SPLIT. Crowds are left out, as YOLO knows none."""
    written = Written()
    splits = _with_one_list(splits)
    classes = {number: place for place, number in enumerate(sorted(next(iter(splits.values())).categories))}
    config: dict[str, object] = {"path": "."}
    for split, reading in splits.items():
        below = "" if split == ALL else f"/{split}"
        config["train" if split == ALL else split] = f"images{below}"
        entries = []
        for entry in _one_per_image(reading, split, written):
            _note_left_out(entry, frozenset((CROWD,)), written)
            kept = tuple(thing for thing in entry.objects if CROWD not in thing.flags)
            entry = msgspec.structs.replace(entry, objects=kept)
            if not entry.width:
                text = "its size is unknown, and YOLO boxes are relative to it"
                written.problems.append(Problem(Kind.IMAGE_SIZE, entry.where, text, fatal=True))
                continue
            entries.append(entry)
            path = (target / f"labels{below}" / entry.file_name).with_suffix(".txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                file.write(yolo.encode(entry, lambda thing, r=reading: classes[r.category_of(thing)]).encode())  # type: ignore[misc]
        _place(entries, reading, target / f"images{below}", place_images, written)
    config["names"] = {place: next(iter(splits.values())).categories[number] for number, place in classes.items()}
    _save(target / "data.yaml", yolo.encode_config(config), written)
    return written


Writer = Callable[[Mapping[str, Reading], Path, PlaceImages], Written]
WRITERS: dict[str, Writer] = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc, "odvg": write_odvg}
NEED_IMAGES = ("yolo", "voc")  # layouts of which the images are a part


def _file_of_split(splits: Mapping[str, Reading], split: str, target: Path, suffix: str) -> Path:
    if len(splits) == 1 and target.suffix in (".json", ".jsonl"):
        return target
    if target.suffix in (".json", ".jsonl"):
        raise ValueError(f"{target}: the data has splits ({', '.join(splits)}); name a folder, or give one split")
    return target / f"{split}{suffix}"


def _usable(reading: Reading, split: str, written: Written) -> Iterator[AnnotatedImage]:
    """The usable entries; what is wrong with them and the others is noted."""
    written.problems += reading.problems
    written.counts[split] = 0
    for entry in reading:
        written.problems += entry.problems
        if entry.usable:
            written.counts[split] += 1
            written.objects += len(entry.objects)
            yield entry


def _one_per_image(reading: Reading, split: str, written: Written) -> Iterator[AnnotatedImage]:
    """The usable entries, those of one image (captions, in grounding data) as one."""
    if not reading.is_grounding():
        yield from _usable(reading, split, written)
        return
    together: dict[str, list[AnnotatedImage]] = {}
    for entry in _usable(reading, split, written):
        together.setdefault(entry.file_name, []).append(entry)
    for entries in together.values():
        named = tuple(thing for entry in entries for thing in entry.objects if thing.name)
        yield msgspec.structs.replace(entries[0], objects=tuple(dict.fromkeys(named)), caption=None)


def _note_left_out(entry: AnnotatedImage, without: frozenset[str], written: Written) -> None:
    flags = [thing.flags & without for thing in entry.objects if thing.flags & without]
    if flags:
        shown = ", ".join(sorted(frozenset().union(*flags)))
        written.problems.append(Problem(Kind.LEFT_OUT, entry.where, f"left out, flagged {shown}: {len(flags)} boxes"))
        written.objects -= len(flags)


def _with_one_list(splits: Mapping[str, Reading]) -> Mapping[str, Reading]:
    """The splits with one list of categories."""
    lists = [reading.categories for reading in splits.values()]
    if all(dict(names) == dict(lists[0]) for names in lists):
        return splits
    names = dict(enumerate(sorted({name for names in lists for name in names.values()})))
    return {split: replace(reading, declared=names) for split, reading in splits.items()}


def _save(path: Path, content: bytes, written: Written) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(content)
    written.files.append(path)


def _place(
    entries: list[AnnotatedImage], reading: Reading, folder: Path, place_images: PlaceImages, written: Written
) -> None:
    """Link or copy the images of entries below `folder`."""
    if place_images == "leave":
        return
    for entry in entries:
        source, target = (reading.images / entry.file_name).absolute(), folder / entry.file_name
        if not source.is_file():
            text = f"{source}: no such image file"
            written.problems.append(Problem(Kind.MISSING_IMAGE, entry.where, text))
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        if place_images == "link":
            temporary.symlink_to(source.resolve())
        else:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
