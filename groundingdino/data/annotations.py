"""Annotation files -> entries, packed: byte offsets into the file instead of a list of dicts.

Training reads ODVG json lines (grounding: captions with regions; detection: boxes with category numbers and a label
map) and MDETR's RefCOCO json, which is taken through `mdetr.convert` first. Evaluation reads MDETR's RefCOCO json as it
is. Boxes are xyxy in pixels of the upright image file.
"""

import json
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from groundingdino.data.formats import mdetr
from groundingdino.inputs.text import Spans

OnBadSample = Literal["stop", "skip"]  # "skip" also counts: see `Entry.problems` and `Batch.problems`

_SIDE = re.compile(rb'"(height|width)"\s*:\s*(\d+)')
_BOTH_SIDES = re.compile(rb'"height": (\d+), "width": (\d+)')  # as converters write them; a third of the time


@dataclass(frozen=True)
class Entry:
    """One image with what is asked of it."""

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
    lines: np.ndarray  # (n,) int64: line of the file, from 1; for MDETR json the number of the `images` entry
    portrait: np.ndarray  # (n,) bool: higher than wide
    label_map: Mapping[int, str] | None = None  # category number -> name: detection data
    text: bytes | None = None  # MDETR json, converted; None: entries are read from `path`
    problems: tuple[str, ...] = ()  # what opening the file left out

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, index: int) -> str:
        """File and line of an entry, for messages."""
        unit = "images entry " if self.text is not None else "line "
        return f"{self.path}: {unit}{self.lines[index]}"

    def entry(self, index: int) -> Entry:
        """Entry number `index`, checked. Boxes that cannot be used are left out and noted in `problems`.

        Raises:
            ValueError: naming file and line, if the entry is not in the format or its caption names nothing.
        """
        where = self.where(index)
        try:
            entry = _read_entry(self._record(index), self.label_map)
        except KeyError as error:
            raise ValueError(f"{where}: field {error} is missing") from error
        except (TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{where}: not an ODVG entry ({error})") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return replace(entry, problems=tuple(f"{where}: {problem}" for problem in entry.problems))

    def _record(self, index: int) -> Any:
        begin, end = int(self.offsets[index]), int(self.offsets[index + 1])
        if self.text is not None:
            raw = self.text[begin:end]
        else:
            with self.path.open("rb") as file:
                file.seek(begin)
                raw = file.read(end - begin)
        try:
            return json.loads(raw)
        except ValueError as error:
            raise ValueError(f"not JSON ({error})") from error


def load_odvg(path: Path, label_map: Mapping[int, str] | Path | None = None) -> Annotations:
    """Open ODVG json lines without parsing them. With a label map (or its file) the entries are detection data.

    Raises:
        ValueError: if a file is missing or empty.
    """
    names = load_label_map(label_map) if isinstance(label_map, Path) else label_map
    offsets, lines, portrait = array("q"), array("q"), bytearray()
    begin = last_end = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
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
    return Annotations(path, np.array(offsets), np.array(lines), np.array(portrait, dtype=bool), names)


def _is_portrait(line: bytes) -> bool:
    both = _BOTH_SIDES.search(line)
    if both is not None:
        return int(both[2]) < int(both[1])
    sides = {name: int(pixels) for name, pixels in reversed(_SIDE.findall(line))}  # the first of each counts
    return sides.get(b"width", 0) < sides.get(b"height", 0)


def load_label_map(path: Path) -> dict[int, str]:
    """A JSON object {"0": "person", ...}. ValueError, naming the file, if it is missing or something else."""
    try:
        content = json.loads(path.read_bytes())
        return {int(number): name.strip() for number, name in content.items()}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, AttributeError) as error:
        raise ValueError(f'{path}: expected a label map such as {{"0": "person"}} ({error})') from error


def load_refcoco(path: Path, on_bad_sample: OnBadSample = "stop") -> Annotations:
    """Open MDETR's RefCOCO json for training, converted entry by entry as the `conversion` command does.

    Raises:
        ValueError: if the file is missing or in another format; with "stop", naming the first box that cannot be used.
    """
    document = mdetr.read_document(path)
    parts, lines, portrait, problems = [], [], [], []
    try:
        for converted in mdetr.convert(document):
            problems += [f"{path}: images entry {converted.number}: {problem}" for problem in converted.problems]
            if problems and on_bad_sample == "stop":
                break
            if converted.line is not None:
                parts.append(json.dumps(converted.line).encode())
                lines.append(converted.number)
                portrait.append(converted.line["width"] < converted.line["height"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if problems and on_bad_sample == "stop":
        raise ValueError(f'{problems[0]}; correct it or choose to skip (on_bad_sample "skip")')
    if not lines:
        raise ValueError(f"{path}: no entry with a usable box")
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return Annotations(
        path,
        offsets,
        np.array(lines, dtype=np.int64),
        np.array(portrait, dtype=bool),
        text=b"".join(parts),
        problems=tuple(problems),
    )


def load_training(path: Path, label_map: Path | None = None, on_bad_sample: OnBadSample = "stop") -> Annotations:
    """`load_refcoco` or `load_odvg`, by what the file holds (both are called .json)."""
    return load_odvg(path, label_map) if _holds_json_lines(path) else load_refcoco(path, on_bad_sample)


def _holds_json_lines(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            first = next((line for line in file if not line.isspace()), b"")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        record = json.loads(first)
    except ValueError:  # a document over several lines, or neither: load_refcoco says
        return b'"filename"' in first
    return isinstance(record, dict) and "images" not in record


def _read_entry(record: Any, label_map: Mapping[int, str] | None) -> Entry:
    width, height = int(record["width"]), int(record["height"])
    spans: tuple[Spans, ...] = ()
    if label_map is not None:
        instances = record.get("detection", {}).get("instances", [])
        boxes = [(number, instance["bbox"], int(instance["label"])) for number, instance in enumerate(instances)]
        unknown = next((label for _, _, label in boxes if label not in label_map), None)
        if unknown is not None:
            raise ValueError(f"label {unknown} is not in the label map")
        caption = None
    else:
        if "grounding" not in record and "detection" in record:
            raise ValueError("detection data needs a label map (label_map_file)")
        caption = record["grounding"]["caption"]
        regions = record["grounding"]["regions"]
        spans = tuple(_region_spans(region, caption) for region in regions)
        boxes = [(n, box, n) for n, region in enumerate(regions) for box in _boxes_of(region["bbox"])]
    kept, problems = [], []
    for number, box, label in boxes:
        problem = _box_problem(box, width, height)
        if problem is None:
            kept.append((box, label))
        else:
            problems.append(f"object {number + 1}: {problem}")
    return Entry(
        record["filename"],
        width,
        height,
        caption,
        np.array([box for box, _ in kept], dtype=np.float64).reshape(-1, 4),
        np.array([label for _, label in kept], dtype=np.int64),
        spans,
        tuple(problems),
    )


def _boxes_of(boxes: list[Any]) -> list[list[float]]:
    """A region has one box, or a list of them."""
    return boxes if isinstance(boxes[0], list) else [boxes]


def _region_spans(region: Mapping[str, Any], caption: str) -> Spans:
    """The characters that name a region: `tokens_positive`, or where its phrase stands in the caption."""
    spans = tuple((int(start), int(end)) for start, end in region.get("tokens_positive") or ())
    if spans:
        wrong = next((span for span in spans if not 0 <= span[0] < span[1] <= len(caption)), None)
        if wrong is not None:
            raise ValueError(f"span {list(wrong)} is not inside the caption of {len(caption)} characters")
        return spans
    phrase = region.get("phrase") or ""
    pieces = [phrase] if isinstance(phrase, str) else list(phrase)
    starts = [caption.lower().find(piece.lower()) for piece in pieces]
    if not all(pieces) or min(starts) < 0:
        raise ValueError(f"a region names nothing: no tokens_positive, phrase {phrase!r} not in {caption!r}")
    return tuple((start, start + len(piece)) for start, piece in zip(starts, pieces, strict=True))


def _box_problem(box: Sequence[float], width: int, height: int) -> str | None:
    if len(box) != 4:
        raise ValueError(f"expected a box [x1, y1, x2, y2], got {box}")
    x1, y1, x2, y2 = box
    shown = f"box [{x1:g}, {y1:g}, {x2:g}, {y2:g}] (x1, y1, x2, y2)"
    if max(0, min(x2, width) - max(x1, 0)) * max(0, min(y2, height) - max(y1, 0)) == 0:
        return f"{shown} lies outside the {width}x{height} image"
    if x2 - x1 < mdetr.MIN_SIDE or y2 - y1 < mdetr.MIN_SIDE:
        return f"{shown} has no area"
    return None


@dataclass(frozen=True)
class Expression:
    """One referring expression to evaluate."""

    sample_id: int  # the `images` entry's id
    number: int  # of the entry in the document, from 1
    file_name: str
    caption: str
    dataset_name: str
    box: tuple[float, float, float, float]  # xyxy as annotated, not clipped


def load_expressions(path: Path) -> tuple[Expression, ...]:
    """MDETR's RefCOCO json for evaluation: every `images` entry, in the order of the file.

    Raises:
        ValueError: naming the entry, if it has no caption, or not exactly one annotation with a box of some area.
    """
    document = mdetr.read_document(path)
    grouped = mdetr.annotations_by_image(document)
    expressions = []
    for number, image in enumerate(document["images"], start=1):
        where = f"{path}: images entry {number}"
        found = grouped.get(image.get("id"), [])
        if len(found) != 1 or len(found[0].get("bbox", ())) != 4:
            raise ValueError(f"{where}: expected one annotation with a bbox of four numbers, found {found}")
        x, y, w, h = found[0]["bbox"]
        if not (w > 0 and h > 0):
            raise ValueError(f"{where}: box [{x:g}, {y:g}, {w:g}, {h:g}] (x, y, width, height) has no area")
        missing = [name for name in ("file_name", "caption") if not image.get(name)]
        if missing:
            raise ValueError(f"{where}: {' and '.join(missing)} missing or empty")
        name = image.get("dataset_name", "refcoco")
        box = (x, y, x + w, y + h)
        expressions.append(Expression(image["id"], number, image["file_name"], image["caption"], name, box))
    if not expressions:
        raise ValueError(f"{path}: no expression in it")
    return tuple(expressions)
