"""Annotation files -> entries, packed: byte offsets into ODVG lines instead of a list of dicts.

Training indexes ODVG json lines where they lie, and packs every other format (see `formats`) into such lines in memory.
Evaluation of referring expressions reads MDETR's json as it is. Boxes are xyxy in pixels of the upright image file.
"""

import io
import os
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from groundingdino.data.formats import mdetr, odvg, registry
from groundingdino.data.formats.files import is_plain_utf8, read_bytes
from groundingdino.data.formats.odvg import load_label_map
from groundingdino.data.formats.record import NOTES, Kind, Reading, ReadOptions
from groundingdino.inputs.text import Spans
from groundingdino.runtime.files import open_file

OnBadSample = Literal["stop", "skip"]  # "skip" also counts: see `Entry.problems` and `Batch.problems`

ONE_DOCUMENT = frozenset(("mdetr", "coco", "lvis"))  # formats whose entries are numbered in one file
HARMLESS = NOTES | {Kind.NUMBERS}  # problems that take nothing from an entry

_SIDE = re.compile(rb'"(height|width)"\s*:\s*(\d+)')
_BOTH_SIDES = re.compile(rb'"height": (\d+), "width": (\d+)')  # as converters write them; a third of the time


@dataclass(frozen=True)
class Entry:
    """One annotated image: its caption or categories, and its boxes."""

    file_name: str
    width: int
    height: int
    caption: str | None  # as in the file; None for detection data
    boxes: np.ndarray  # (N, 4) float64
    labels: np.ndarray  # (N,) int64: index into `spans`, or the category's number
    spans: tuple[Spans, ...]  # per region, characters of the caption; empty for detection data
    problems: tuple[str, ...]  # what was left out of it, naming file and line


@dataclass(frozen=True)
class Annotations:
    """A training file. Holds 17 bytes an entry (and the text itself for MDETR json), so workers share it cheaply."""

    path: Path
    offsets: np.ndarray  # (n + 1,) int64: entry i is bytes [offsets[i], offsets[i + 1])
    lines: np.ndarray  # (n,) int64: line of the file, from 1; of another format, the number of the entry
    portrait: np.ndarray  # (n,) bool: higher than wide
    label_map: Mapping[int, str] | None = None  # category number -> name: detection data
    text: bytes | None = None  # the lines themselves; None: they are read from `path`
    unit: str = "line"  # what `lines` counts
    places: tuple[str, ...] = ()  # file of each entry, of a format with a file for each
    problems: tuple[str, ...] = ()  # what opening the file left out
    allow_outside: bool = False  # see ReadOptions
    stamp: tuple[int, int] | None = None  # size and time of change of `path`, where its lines are read later

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, index: int) -> str:
        """File and line of an entry, for messages."""
        return self.places[index] if self.places else f"{self.path}: {self.unit} {self.lines[index]}"

    def entry(self, index: int) -> Entry:
        """Entry number `index`, checked. Boxes that cannot be used are left out and noted in `problems`.

        Raises:
            ValueError: naming file and line, if the entry is not in the format or its caption names nothing.
        """
        image = odvg.convert_line(self._line(index), self.where(index), self.label_map, self.allow_outside)
        fatal = next((problem for problem in image.problems if problem.fatal), None)
        if fatal is not None:
            raise ValueError(str(fatal))
        return Entry(
            image.file_name,
            image.width,
            image.height,
            image.caption,
            np.array([thing.box for thing in image.objects], dtype=np.float64).reshape(-1, 4),
            np.array([thing.label for thing in image.objects], dtype=np.int64),
            image.regions,
            tuple(map(str, image.problems)),
        )

    def _line(self, index: int) -> bytes:
        begin, end = int(self.offsets[index]), int(self.offsets[index + 1])
        if self.text is not None:
            return self.text[begin:end]
        with open_file(self.path) as file:
            if _stamp(file) != self.stamp:
                raise ValueError(f"{self.path}: changed since it was opened: start again")
            file.seek(begin)
            return file.read(end - begin)


def load_odvg(
    path: Path, label_map: Mapping[int, str] | Path | None = None, *, allow_outside: bool = False
) -> Annotations:
    """Open ODVG json lines without parsing them. With a label map (or its file) the entries are detection data.

    Raises:
        ValueError: if a file is missing or empty.
    """
    names = load_label_map(label_map) if isinstance(label_map, Path) else label_map
    offsets, lines, portrait = array("q"), array("q"), bytearray()
    begin = last_end = 0
    text = None
    try:
        with open_file(path) if path.is_file() else io.BytesIO(read_bytes(path)) as file:
            stamp = _stamp(file)
            if not is_plain_utf8(file.read(4)):
                text = read_bytes(path)  # packed, or UTF-16: held in memory
            file.seek(0)
            for number, line in enumerate(file if text is None else io.BytesIO(text), start=1):
                end = begin + len(line)
                if not line.isspace():
                    offsets.append(begin)
                    lines.append(number)
                    portrait.append(_is_portrait(line))
                    last_end = end
                begin = end
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if not lines:
        raise ValueError(f"{path}: the annotation file is empty")
    # A blank line between two entries becomes white space at the end of the first.
    offsets.append(last_end)
    return Annotations(
        path,
        np.array(offsets),
        np.array(lines),
        np.array(portrait, dtype=bool),
        names,
        text,
        allow_outside=allow_outside,
        stamp=stamp,
    )


def _stamp(file: BinaryIO) -> tuple[int, int] | None:
    """Size and time of the last change of an open file; None of bytes in memory."""
    if isinstance(file, io.BytesIO):
        return None
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _is_portrait(line: bytes) -> bool:
    both = _BOTH_SIDES.search(line)
    if both is not None:
        return int(both[2]) < int(both[1])
    sides = {name: int(pixels) for name, pixels in reversed(_SIDE.findall(line))}  # the first of each counts
    return sides.get(b"width", 0) < sides.get(b"height", 0)


def load_refcoco(path: Path, on_bad_sample: OnBadSample = "stop", *, allow_outside: bool = False) -> Annotations:
    """Open MDETR's RefCOCO json for training, converted entry by entry as `groundingdino data convert` does.

    Raises:
        ValueError: if the file is missing or in another format; with "stop", naming the first box that cannot be used.
    """
    return pack(mdetr.read(path, ReadOptions(allow_outside=allow_outside)), on_bad_sample)


def pack(reading: Reading, on_bad_sample: OnBadSample = "stop") -> Annotations:
    """Annotations of any format for training, as ODVG lines in memory, with the names of their categories.

    Crowds, and objects that are not to be counted, are left out, as mmdet's converters do.

    Raises:
        ValueError: if no entry is usable; with "stop", naming the first problem.
    """
    parts, places, lines, portrait = [], [], [], []
    problems = [problem for problem in reading.problems if problem.kind not in HARMLESS]
    grounding = reading.is_grounding()
    without = odvg.flags_left_out(reading.format)
    label_of = None if grounding else odvg.label_function(reading)
    for entry in reading:
        problems += [problem for problem in entry.problems if problem.kind not in HARMLESS]
        if problems and on_bad_sample == "stop":
            raise ValueError(f'{problems[0]}; correct it or choose to skip (on_bad_sample "skip")')
        if entry.usable:
            parts.append(odvg.dumps(odvg.encode(entry, label_of, without)))
            places.append(entry.where)
            lines.append(entry.number)
            portrait.append(entry.width < entry.height)
    if not lines:
        raise ValueError(f"{reading.path}: no entry with a usable box")
    return Annotations(
        reading.path,
        np.cumsum([0, *map(len, parts)], dtype=np.int64),
        np.array(lines, dtype=np.int64),
        np.array(portrait, dtype=bool),
        None if grounding else odvg.label_map_of(reading),
        b"".join(parts),
        *(("images entry", ()) if reading.format in ONE_DOCUMENT else ("", tuple(places))),
        tuple(map(str, problems)),
    )


def load_training(
    path: Path,
    label_map: Path | None = None,
    on_bad_sample: OnBadSample = "stop",
    *,
    options: ReadOptions | None = None,
) -> Annotations:
    """Annotations of any format for training, found by what the file or folder holds.

    ODVG files are not parsed but indexed; every other format is read whole, see `pack`.

    Args:
        path: file or folder.
        label_map: of ODVG detection data.
        on_bad_sample: "stop" raises at the first box or entry that cannot be used, "skip" notes it.
        options: see `ReadOptions`.
    Raises:
        ValueError: naming file and line.
    """
    options = options or ReadOptions()
    if registry.find_format(path) == "odvg":
        return load_odvg(path, label_map or odvg.label_map_beside(path), allow_outside=options.allow_outside)
    return pack(registry.read(path, options), on_bad_sample)


@dataclass(frozen=True)
class ReferringExpression:
    """One referring expression to evaluate."""

    sample_id: int | str  # the `images` entry's id
    number: int  # of the entry in the document, from 1
    file_name: str
    caption: str
    dataset_name: str
    box: tuple[float, float, float, float]  # xyxy as annotated, not clipped
    size: tuple[int, int] | None = None  # (width, height) of the image as annotated; boxes are off in any other


def load_expressions(path: Path, *, allow_outside: bool = False) -> tuple[ReferringExpression, ...]:
    """MDETR's RefCOCO json for evaluation: every `images` entry, in the order of the file.

    Raises:
        ValueError: naming the entry, if it cannot be used, its box lies outside its image or has no area, its caption
            is empty, or it has not exactly one annotation.
    """
    reading = mdetr.read(path, ReadOptions(allow_outside=allow_outside))
    if reading.problems:
        raise ValueError(str(reading.problems[0]))
    expressions = []
    for entry in sorted(reading, key=lambda entry: entry.number):
        wrong = next((problem for problem in entry.problems if problem.kind is not Kind.UNNAMED), None)
        if wrong is not None:
            raise ValueError(str(wrong))
        if len(entry.objects) != 1:
            raise ValueError(f"{entry.where}: expected one annotation, found {len(entry.objects)}")
        if not entry.caption:
            raise ValueError(f"{entry.where}: caption missing or empty")
        (thing,), size = entry.objects, (entry.width, entry.height)
        expressions.append(
            ReferringExpression(
                entry.image_id, entry.number, entry.file_name, entry.caption, entry.extra, thing.box, size
            )
        )
    if not expressions:
        raise ValueError(f"{path}: no expression in it")
    return tuple(expressions)
