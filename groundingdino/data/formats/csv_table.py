"""CSV, one box a row: OpenImages' columns, and tables of file name, box and class as people export them."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from groundingdino.data.formats import files
from groundingdino.data.formats.record import (
    CROWD,
    DEPICTION,
    INSIDE,
    NO_FLAGS,
    OCCLUDED,
    TRUNCATED,
    AnnotatedImage,
    AnnotatedObject,
    Box,
    Kind,
    Problem,
    Reading,
    ReadOptions,
    checked,
)

# Names of columns, in lower case without "_", of which the first that is there counts.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "file": ("filename", "imageid", "image", "imagepath", "path", "file", "img", "imagename"),
    "name": ("labelname", "class", "label", "category", "name", "classname", "categoryname"),
    "x1": ("xmin", "x1", "left", "xtl"),
    "y1": ("ymin", "y1", "top", "ytl"),
    "x2": ("xmax", "x2", "right", "xbr"),
    "y2": ("ymax", "y2", "bottom", "ybr"),
    "width": ("width", "imagewidth", "imgwidth"),
    "height": ("height", "imageheight", "imgheight"),
}
REQUIRED = ("file", "name", "x1", "y1", "x2", "y2")
RETINANET = {"file": 0, "x1": 1, "y1": 2, "x2": 3, "y2": 4, "name": 5}  # keras-retinanet's rows have no header
OPEN_IMAGES_FLAGS = {
    "isoccluded": OCCLUDED,
    "istruncated": TRUNCATED,
    "isgroupof": CROWD,
    "isdepiction": DEPICTION,
    "isinside": INSIDE,
}


@dataclass(frozen=True)
class _Table:
    """How to read the rows of one file."""

    path: Path
    columns: Mapping[str, int]
    flags: Mapping[int, str]  # column -> flag
    relative: bool  # OpenImages: boxes are in [0, 1] of the image
    names: Mapping[str, str]  # OpenImages: /m/01g317 -> Person; empty: names stand in the rows
    folder: files.ImageFolder
    allow_outside: bool


def read(path: Path, options: ReadOptions) -> Reading:
    """A table with one box a row, in pixels.

    Raises:
        ValueError: naming the file, if it is missing or its columns are not known.
    """
    return _read(path, options, relative=False)


def read_openimages(path: Path, options: ReadOptions) -> Reading:
    """An OpenImages table. Sizes come from the images; names from class-descriptions*.csv beside it, if it is there.

    Raises:
        ValueError: naming the file, if it is missing or its columns are not known.
    """
    return _read(path, options, relative=True)


def _read(path: Path, options: ReadOptions, relative: bool) -> Reading:
    rows = list(files.read_rows(path))
    if not rows:
        raise ValueError(f"{path}: the annotation file is empty")
    columns, flags = _find_columns(rows[0][1])
    if columns is None:
        raise ValueError(f"{path}: expected columns for file name, class, xmin, ymin, xmax, ymax; found {rows[0][1]}")
    if columns is not RETINANET:
        rows = rows[1:]
    names = _class_descriptions(path) if relative else {}
    grouped: dict[str, list[tuple[int, list[str]]]] = defaultdict(list)
    problems = []
    for line, row in rows:
        if len(row) <= max(columns.values()):
            text = f"{len(row)} fields, expected {max(columns.values()) + 1}"
            problems.append(Problem(Kind.MALFORMED, f"{path}: line {line}", text))
        else:
            grouped[row[columns["file"]].strip()].append((line, row))
    first = next(iter(grouped), "")
    guessed = options.images or files.guess_images(path, first if Path(first).suffix else f"{first}.jpg")
    folder = files.ImageFolder(guessed)
    table = _Table(path, columns, flags, relative, names, folder, options.allow_outside)
    commas = sum(_has_comma(table, row) for _, row in rows)
    if commas:
        where = f"{path}: line {next(line for line, row in rows if _has_comma(table, row))}"
        problems.append(Problem(Kind.NUMBERS, where, f"decimal commas, in {commas} rows in all; read as points"))

    def entries() -> Iterator[AnnotatedImage]:
        for number, (file_name, own) in enumerate(grouped.items(), start=1):
            yield checked(_convert(table, file_name, own, number), options.allow_outside)

    declared = dict(enumerate(names.values())) if names else None
    return Reading(path, "openimages" if relative else "csv", entries, folder.root, declared, tuple(problems))


def _key(title: str) -> str:
    return title.strip().lower().replace("_", "").replace(" ", "")


def _find_columns(header: Sequence[str]) -> tuple[Mapping[str, int] | None, dict[int, str]]:
    keys = [_key(title) for title in header]
    found = {
        role: keys.index(name)
        for role, names in COLUMNS.items()
        if (name := next((n for n in names if n in keys), None))
    }
    if all(role in found for role in REQUIRED):
        return found, {keys.index(key): flag for key, flag in OPEN_IMAGES_FLAGS.items() if key in keys}
    try:
        for field in header[1:5]:
            files.parse_number(field)
    except ValueError:
        return None, {}
    return (RETINANET if len(header) == 6 else None), {}


def _has_comma(table: _Table, row: Sequence[str]) -> bool:
    return any(
        "," in row[table.columns[corner]] for corner in ("x1", "y1", "x2", "y2") if table.columns[corner] < len(row)
    )


def _class_descriptions(path: Path) -> dict[str, str]:
    """OpenImages' label -> name, in the order of the file, which numbers the categories."""
    found = sorted(path.parent.glob("*class-descriptions*.csv"))
    return {row[0].strip(): row[1].strip() for _, row in files.read_rows(found[0]) if len(row) > 1} if found else {}


def _convert(table: _Table, file_name: str, rows: list[tuple[int, list[str]]], number: int) -> AnnotatedImage:
    where, problems, objects = f"{table.path}: line {rows[0][0]}", [], []
    image = table.folder.find(file_name) if file_name else None
    name = str(image.relative_to(table.folder.root)) if image and not Path(file_name).suffix else file_name
    if table.relative and not Path(name).suffix:
        name += ".jpg"
    width, height = _size(table, rows[0][1])
    if not width:
        width, height = files.size_or_zero(image)
    if table.relative and not width:
        text = f"boxes are relative to {file_name!r:.80}, whose size is unknown: the image is missing or broken"
        problem = Problem(Kind.MISSING_IMAGE, where, text, fatal=True)
        return AnnotatedImage(where, name, problems=(problem,), number=number)
    labels = {text: place for place, text in enumerate(table.names)}
    for line, row in rows:
        label = row[table.columns["name"]].strip()
        box = _box(table, row, (width, height) if table.relative else (1, 1))
        if isinstance(box, str):
            problems.append(Problem(Kind.MALFORMED, f"{table.path}: line {line}", box))
        elif not label or (table.names and label not in table.names):
            problems.append(Problem(Kind.UNKNOWN_CATEGORY, f"{table.path}: line {line}", f"class {label!r:.60}"))
        else:
            flags = frozenset(flag for column, flag in table.flags.items() if row[column : column + 1] == ["1"])
            category = table.names.get(label, label)
            objects.append(AnnotatedObject(box, labels.get(label, -1), category, line, flags or NO_FLAGS))
    return AnnotatedImage(
        where, name, width, height, tuple(objects), problems=tuple(problems), object_unit="line", number=number
    )


def _size(table: _Table, row: Sequence[str]) -> tuple[int, int]:
    try:
        width, height = (int(files.parse_number(row[table.columns[side]])[0]) for side in ("width", "height"))
        return width, height
    except (KeyError, ValueError, OverflowError):
        return 0, 0


def _box(table: _Table, row: Sequence[str], scale: tuple[int, int]) -> Box | str:
    """The box in pixels, or why there is none."""
    try:
        x1, y1, x2, y2 = (files.parse_number(row[table.columns[c]])[0] for c in ("x1", "y1", "x2", "y2"))
    except ValueError as error:
        return str(error)
    return x1 * scale[0], y1 * scale[1], x2 * scale[0], y2 * scale[1]


def sniff(sample: files.Sample) -> bool:
    """Whether a file's first row names columns of boxes in pixels, or is one of keras-retinanet's."""
    return _first_columns(sample) is not None and not sniff_openimages(sample)


def sniff_openimages(sample: files.Sample) -> bool:
    """Whether a file's first row is OpenImages'."""
    first = sample.head.split(b"\n")[0]
    return _first_columns(sample) is not None and b"ImageID" in first and b"LabelName" in first


def _first_columns(sample: files.Sample) -> Mapping[str, int] | None:
    if sample.is_folder or sample.head.lstrip().startswith((b"{", b"[", b"<")) or b"\0" in sample.head:
        return None
    try:
        row = next(files.read_rows(sample.path), None)
    except ValueError:
        return None
    return _find_columns(row[1])[0] if row else None
