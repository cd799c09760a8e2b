"""ODVG json lines: grounding (a caption with regions) and detection (boxes with category numbers and a label map).

The format of mmdetection's open-vocabulary training data, and the one that training packs every other format into.
`convert_line` is the one conversion: training, checking, converting and evaluating call it.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from groundingdino.data.formats import files
from groundingdino.data.formats.coco_categories import COCO_IDS, PLACES
from groundingdino.data.formats.record import (
    CROWD,
    DIFFICULT,
    FLAGS,
    NO_FLAGS,
    AnnotatedImage,
    AnnotatedObject,
    Box,
    Kind,
    Problem,
    Reading,
    ReadOptions,
    checked,
    first_file_name,
    unusable,
)
from groundingdino.inputs.text import Spans

Number = int | float
MOST_LABEL = 2**31 - 1  # of a category
Json = dict[str, Any]


class _Region(msgspec.Struct):
    bbox: list[Number | list[Number]]  # one box, or a list of them
    phrase: str | list[str] = ""
    tokens_positive: list[tuple[int, int]] | None = None


class _Grounding(msgspec.Struct):
    caption: str
    regions: list[_Region]


class _Instance(msgspec.Struct):
    bbox: tuple[Number, Number, Number, Number]
    label: int
    category: str = ""


class _Detection(msgspec.Struct):
    instances: list[_Instance] = []


class Line(msgspec.Struct):
    """One line of an ODVG file."""

    filename: str
    height: int
    width: int
    grounding: _Grounding | None = None
    detection: _Detection | None = None


def convert_line(
    raw: bytes, where: str, label_map: Mapping[int, str] | None = None, allow_outside: bool = False
) -> AnnotatedImage:
    """One line as an annotated image; a line that cannot be used has a fatal problem.

    Args:
        raw: the line.
        where: its file and number, for messages.
        label_map: of detection data; without one, lines with a caption are expected.
        allow_outside: see `ReadOptions`.
    """
    try:
        line = files.decode(raw, Line)
    except ValueError as error:
        return unusable(where, str(error))
    try:
        if label_map is not None:
            entry = _detection(line, where, label_map)
        elif line.grounding is not None:
            entry = _grounding(line, line.grounding, where)
        elif line.detection is not None:
            return unusable(where, "detection data needs a label map (label_map_file)")
        else:
            return unusable(where, "it has neither a caption (grounding) nor boxes (detection)")
    except _UnusableError as error:
        return unusable(where, error.text, error.kind)
    return checked(entry, allow_outside)


class _UnusableError(Exception):
    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind, self.text = kind, text


def _detection(line: Line, where: str, label_map: Mapping[int, str]) -> AnnotatedImage:
    objects = []
    for number, instance in enumerate(line.detection.instances if line.detection else (), start=1):
        name = label_map.get(instance.label)
        if name is None:
            raise _UnusableError(Kind.UNKNOWN_CATEGORY, f"label {instance.label} is not in the label map")
        objects.append(AnnotatedObject(instance.bbox, instance.label, name, number))
    return AnnotatedImage(where, line.filename, line.width, line.height, tuple(objects))


def _grounding(line: Line, grounding: _Grounding, where: str) -> AnnotatedImage:
    caption, objects, spans = grounding.caption, [], []
    for label, region in enumerate(grounding.regions):
        spans.append(_region_spans(region, caption))
        name = region.phrase if isinstance(region.phrase, str) else " ".join(region.phrase)
        name = name or " ".join(caption[start:end] for start, end in spans[-1])
        objects += [AnnotatedObject(box, label, name, label + 1) for box in _boxes_of(region.bbox)]
    return AnnotatedImage(where, line.filename, line.width, line.height, tuple(objects), caption, tuple(spans))


def _boxes_of(boxes: list[Any]) -> list[Box]:
    several = boxes if boxes and isinstance(boxes[0], list) else [boxes]
    for box in several:
        if not isinstance(box, list) or len(box) != 4 or any(isinstance(side, list) for side in box):
            raise _UnusableError(Kind.MALFORMED, f"expected a box [x1, y1, x2, y2], got {str(box)[:80]}")
    return [tuple(box) for box in several]


def _region_spans(region: _Region, caption: str) -> Spans:
    """The characters that name a region: `tokens_positive`, or where its phrase stands in the caption."""
    if region.tokens_positive:
        spans = tuple(region.tokens_positive)
        wrong = next((span for span in spans if not 0 <= span[0] < span[1] <= len(caption)), None)
        if wrong is not None:
            text = f"span {str(list(wrong))[:60]} is not inside the caption of {len(caption)} characters"
            raise _UnusableError(Kind.SPAN, text)
        return spans
    pieces = [region.phrase] if isinstance(region.phrase, str) else region.phrase
    lowered = caption.lower()
    starts = [lowered.find(piece.lower()) for piece in pieces]
    if not pieces or not all(pieces) or min(starts) < 0:
        text = f"a region names nothing: no tokens_positive, phrase {_short(region.phrase)} not in {_short(caption)}"
        raise _UnusableError(Kind.UNNAMED, text)
    return tuple((start, start + len(piece)) for start, piece in zip(starts, pieces, strict=True))


def _short(text: Any) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:79] + "…"


def load_label_map(path: Path) -> dict[int, str]:
    """A JSON object {"0": "person", ...}. ValueError, naming the file, if it is missing or something else."""
    try:
        content = files.read_json(path, dict[str, str])
        names = {int(number): name.strip() for number, name in content.items()}
        wrong = next((number for number in names if not 0 <= number <= MOST_LABEL), None)
        if wrong is not None:
            raise ValueError(f"number {str(wrong)[:30]} is not from 0 to {MOST_LABEL}")
        return names
    except ValueError as error:
        text = str(error).removeprefix(f"{path}: ")
        if "no such" in text or "cannot be read" in text:
            raise ValueError(f"{path}: {text}") from error
        raise ValueError(f'{path}: expected a label map such as {{"0": "person"}} ({text})') from error


def label_map_beside(path: Path) -> Path | None:
    """The label map that lies beside an ODVG file under its name, as `write` leaves it."""
    stem = path.name.split(".")[0]
    candidates = [map_path(path, stem), map_path(path, stem.removesuffix("_od"))]
    return next((found for found in candidates if found.is_file()), None)


def map_path(path: Path, stem: str) -> Path:
    """Where the label map of an ODVG file lies."""
    return path.with_name(f"{stem}_label_map.json")


def read(path: Path, options: ReadOptions) -> Reading:
    """An ODVG file. Detection data take their names from the label map, or, without one, from their lines."""
    content = files.read_bytes(path)
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line and not line.isspace()]
    if not lines:
        raise ValueError(f"{path}: the annotation file is empty")
    first = next((line for _, line in lines if b'"grounding"' in line or b'"detection"' in line), b"")
    label_map: Mapping[int, str] | None = None
    problems: tuple[Problem, ...] = ()
    if b'"grounding"' not in first:
        map_path = options.label_map or label_map_beside(path)
        label_map = load_label_map(map_path) if map_path else _names_in_lines(lines)

    def entries() -> Iterator[AnnotatedImage]:
        for number, line in lines:
            yield convert_line(line, f"{path}: line {number}", label_map, options.allow_outside)

    name = first_file_name(entries())
    return Reading(path, "odvg", entries, options.images or files.guess_images(path, name), label_map, problems)


def _names_in_lines(lines: list[tuple[int, bytes]]) -> dict[int, str]:
    names: dict[int, str] = {}
    for _, raw in lines:
        try:
            line = files.decode(raw, Line)
        except ValueError:
            continue  # `convert_line` will say
        for instance in line.detection.instances if line.detection else ():
            names.setdefault(instance.label, instance.category or str(instance.label))
    return dict(sorted(names.items()))


def sniff(sample: files.Sample) -> bool:
    """Whether a file holds JSON lines with a file name each."""
    return "filename" in sample.first_line_keys and "images" not in sample.first_line_keys


def label_map_of(reading: Reading) -> dict[int, str]:
    """ODVG label -> name of a data set's categories."""
    labels = _label_numbers(reading)
    return {labels[number]: name for number, name in reading.categories.items()}


def label_function(reading: Reading) -> Callable[[AnnotatedObject], int]:
    """What gives an object its ODVG label."""
    labels = _label_numbers(reading)
    return lambda thing: labels[reading.category_of(thing)]


def _label_numbers(reading: Reading) -> dict[int, int]:
    """Category number -> ODVG label, as mmdet's converters number them: COCO's 80 by their place, LVIS' by id - 1,
    all others by their order."""
    if reading.format == "lvis":
        return {number: number - 1 for number in reading.categories}
    if reading.format == "coco" and all(COCO_IDS.get(number) == name for number, name in reading.categories.items()):
        return {number: PLACES[number] for number in reading.categories}
    if reading.format == "odvg":
        return {number: number for number in reading.categories}
    return {number: place for place, number in enumerate(sorted(reading.categories))}


def flags_left_out(format_name: str) -> frozenset[str]:
    """Which objects ODVG's detection data do not hold, as in mmdet's converters: crowds and those to be ignored; of
    OpenImages also truncated and occluded ones, depictions and insides."""
    return frozenset(FLAGS) if format_name == "openimages" else frozenset((CROWD, DIFFICULT))


def encode(
    entry: AnnotatedImage,
    label_of: Callable[[AnnotatedObject], int] | None = None,
    without: frozenset[str] = NO_FLAGS,
) -> Json:
    """An entry as an ODVG line.

    Args:
        entry: any usable one.
        label_of: the ODVG label of an object; None keeps its own.
        without: flags of objects to leave out.
    """
    line: Json = {"filename": entry.file_name, "height": entry.height, "width": entry.width}
    if entry.caption is not None:
        return {**line, "grounding": {"caption": entry.caption, "regions": _encode_regions(entry)}}
    instances = [
        {"bbox": list(thing.box), "label": label_of(thing) if label_of else thing.label, "category": thing.name}
        for thing in entry.objects
        if not thing.flags & without
    ]
    return {**line, "detection": {"instances": instances}}


def _encode_regions(entry: AnnotatedImage) -> list[Json]:
    """Boxes with the same phrase become one region with several boxes, which keeps the first one's spans."""
    assert entry.caption is not None
    regions: dict[str, Json] = {}
    for thing in entry.objects:
        if CROWD in thing.flags or not entry.regions[thing.label]:
            continue
        x1, y1, x2, y2 = thing.box
        box = [x1, y1, min(x2, entry.width), min(y2, entry.height)]  # mmdet clips these two sides only
        spans = [list(span) for span in entry.regions[thing.label]]
        pieces = phrase_pieces(entry.caption, spans)
        key = " ".join(pieces)
        if key not in regions:
            phrase = pieces[0] if len(pieces) == 1 else pieces
            regions[key] = {"bbox": box, "phrase": phrase, "tokens_positive": spans}
        elif isinstance(regions[key]["bbox"][0], list):
            regions[key]["bbox"].append(box)
        else:
            regions[key]["bbox"] = [regions[key]["bbox"], box]
    return list(regions.values())


def phrase_pieces(caption: str, spans: list[list[int]]) -> list[str]:
    """The words of the spans; spans with only a space between them are one piece."""
    pieces: list[str] = []
    previous_end: int | None = None
    for start, end in spans:
        words = caption[start:end]
        if previous_end is not None and start == previous_end + 1 and caption[previous_end] == " ":
            pieces[-1] += " " + words
        else:
            pieces.append(words)
        previous_end = end
    return pieces


def dumps(line: Json) -> bytes:
    """A line as mmdet writes it."""
    return json.dumps(line, ensure_ascii=False).encode()
