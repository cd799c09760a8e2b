"""Writing data sets: COCO, YOLO, Pascal VOC and ODVG, from the entries of any format, each file atomically."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec

from groundingdino.data.formats import coco, odvg, voc, yolo
from groundingdino.data.formats.files import is_file
from groundingdino.data.formats.record import CROWD, AnnotatedImage, Kind, Problem, Reading
from groundingdino.runtime.files import atomic_file, atomic_folder

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
        entries = _one_per_image(reading, split, written)
        if place_images != "leave":
            entries = _placed(entries, reading, path.parent / "images", place_images, written)
        _save(path, msgspec.json.encode(coco.encode(reading, entries)), written)
    return written


def write_odvg(splits: Mapping[str, Reading], target: Path, place_images: PlaceImages) -> Written:
    """A file of json lines per split, as mmdet's converters write it, and a label map beside it for detection data."""
    written = Written()
    for split, reading in splits.items():
        path = _file_of_split(splits, split, target, ".jsonl")
        grounding = reading.is_grounding()
        label_of = None if grounding else odvg.label_function(reading)
        without = odvg.flags_left_out(reading.format)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            entries = _usable(reading, split, written)
            if place_images != "leave":
                entries = _placed(entries, reading, path.parent / "images", place_images, written)
            for entry in entries:
                _note_left_out(entry, without, written)
                file.write(odvg.dumps(odvg.encode(entry, label_of, without)) + b"\n")
        written.files.append(path)
        if not grounding:
            names = {str(label): name for label, name in odvg.label_map_of(reading).items()}
            _save(odvg.map_path(path, path.name.split(".")[0]), odvg.dumps(names), written)
    return written


def write_voc(splits: Mapping[str, Reading], target: Path, place_images: PlaceImages) -> Written:
    """VOC's layout: Annotations, ImageSets/Main/SPLIT.txt, and JPEGImages unless images are left where they are.

    The folder appears as a whole; OSError if something is there already.
    """
    written = Written()
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as folder:
        (folder / "Annotations").mkdir()
        (folder / "ImageSets" / "Main").mkdir(parents=True)
        for split, reading in splits.items():
            stems = []
            entries = _one_per_image(reading, split, written)
            for entry in (
                entries
                if place_images == "leave"
                else _placed(entries, reading, folder / "JPEGImages", place_images, written)
            ):
                stem = str(Path(entry.file_name).with_suffix("")).replace("/", "_")
                file = folder / "Annotations" / f"{stem}.xml"
                if _is_taken(file, entry, written):
                    continue
                file.write_bytes(voc.encode(entry))
                stems.append(stem)
            listed = f"ImageSets/Main/{'trainval' if split == ALL else split}.txt"
            (folder / listed).write_text("".join(f"{stem}\n" for stem in stems))
            written.files.append(target / listed)
    return written


def write_yolo(splits: Mapping[str, Reading], target: Path, place_images: PlaceImages) -> Written:
    """ultralytics' layout: data.yaml, labels/SPLIT/*.txt and images/SPLIT. Crowds are left out, as YOLO knows none.

    The folder appears as a whole; OSError if something is there already.
    """
    written = Written()
    splits = _with_one_list(splits)
    categories = next(iter(splits.values())).categories
    classes = {number: place for place, number in enumerate(sorted(categories))}
    config: dict[str, object] = {"path": "."}
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as folder:
        for split, reading in splits.items():
            below = "" if split == ALL else f"/{split}"
            config["train" if split == ALL else split] = f"images{below}"
            entries = _one_per_image(reading, split, written)
            for entry in _placed(entries, reading, folder / f"images{below}", place_images, written):
                _write_labels(entry, reading, classes, folder / f"labels{below}", written)
        config["names"] = {place: categories[number] for number, place in classes.items()}
        (folder / "data.yaml").write_bytes(yolo.encode_config(config))
    written.files.append(target / "data.yaml")
    return written


def _write_labels(
    entry: AnnotatedImage, reading: Reading, classes: Mapping[int, int], folder: Path, written: Written
) -> None:
    if not entry.width:
        told = "its size is unknown, and YOLO boxes are relative to it"
        written.problems.append(Problem(Kind.IMAGE_SIZE, entry.where, told, fatal=True))
        return
    _note_left_out(entry, frozenset((CROWD,)), written)
    kept = tuple(thing for thing in entry.objects if CROWD not in thing.flags)
    entry = msgspec.structs.replace(entry, objects=kept)
    file = (folder / entry.file_name).with_suffix(".txt")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not _is_taken(file, entry, written):
        file.write_text(yolo.encode(entry, lambda thing: classes[reading.category_of(thing)]))


def _is_taken(file: Path, entry: AnnotatedImage, written: Written) -> bool:
    """Whether an image of the same name but for its suffix has this annotation file; noted."""
    if file.exists():
        told = f"{entry.file_name}: another image of this name, or with another suffix, has the file {file.name}"
        written.problems.append(Problem(Kind.DUPLICATE_IMAGE, entry.where, told, fatal=True))
    return file.exists()


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


def _placed(
    entries: Iterable[AnnotatedImage], reading: Reading, folder: Path, place_images: PlaceImages, written: Written
) -> Iterator[AnnotatedImage]:
    """The entries, with their images linked or copied below `folder` and named as they lie there."""
    for entry in entries:
        source = (reading.images / entry.file_name).absolute()
        parts = [part for part in Path(entry.file_name).parts if part not in ("..", Path(entry.file_name).anchor)]
        target = folder.joinpath(*parts)
        if place_images != "leave" and not is_file(source):
            written.problems.append(Problem(Kind.MISSING_IMAGE, entry.where, f"{source}: no such image file"))
        elif place_images != "leave" and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            if place_images == "link":
                target.symlink_to(source.resolve())
            else:
                shutil.copyfile(source, target)
        yield msgspec.structs.replace(entry, file_name="/".join(parts))
