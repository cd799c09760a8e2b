"""LabelMe: one json file per image with shapes; rectangles, and the bounding boxes of polygons and circles."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from groundingdino.data.formats import files
from groundingdino.data.formats.record import (
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

Number = int | float


class _Shape(msgspec.Struct):
    label: str
    points: list[tuple[Number, Number]]
    shape_type: str = "polygon"


class _Document(msgspec.Struct):
    shapes: list[_Shape]
    imagePath: str
    imageWidth: int | None = None
    imageHeight: int | None = None


def read(path: Path, options: ReadOptions) -> Reading:
    """A folder of LabelMe files, or one of them.

    Raises:
        ValueError: naming the folder, if there is none in it.
    """
    found = [path] if path.is_file() else sorted(path.glob("*.json"))
    if not found:
        raise ValueError(f"{path}: no json file in this folder")
    first = first_file_name(_entries(found[:5], None, True))
    folder = files.ImageFolder(options.images or files.guess_images(path, first))

    def entries() -> Iterator[AnnotatedImage]:
        return _entries(found, folder, options.allow_outside)

    return Reading(path, "labelme", entries, folder.root)


def _entries(found: list[Path], folder: files.ImageFolder | None, allow_outside: bool) -> Iterator[AnnotatedImage]:
    for number, file in enumerate(found, start=1):
        try:
            document = files.read_json(file, _Document)
        except ValueError as error:
            yield unusable(str(file), str(error).removeprefix(f"{file}: "), number=number)
            continue
        yield checked(_convert(file, document, number, folder), allow_outside)


def _convert(file: Path, document: _Document, number: int, folder: files.ImageFolder | None) -> AnnotatedImage:
    where, problems, objects = str(file), [], []
    # LabelMe writes the way from the json file to the image ("../images/a.jpg"); the folder of images is known here.
    name = document.imagePath.replace("\\", "/")
    while name.startswith("../"):
        name = name[3:]
    if folder is not None and (image := folder.find(name) or folder.find(Path(name).name)) is not None:
        name = str(image.relative_to(folder.root))
    width, height = document.imageWidth or 0, document.imageHeight or 0
    if not (width > 0 and height > 0) and folder is not None:
        problems.append(Problem(Kind.IMAGE_SIZE, where, f"size is {width}x{height}"))
        width, height = files.size_or_zero(folder.find(name))
    for place, shape in enumerate(document.shapes, start=1):
        box = _box(shape)
        if box is None:
            problems.append(Problem(Kind.NOT_A_BOX, where, f"shape {place} ({shape.shape_type:.20}) is left out"))
            continue
        objects.append(AnnotatedObject(box, -1, shape.label, place))
    return AnnotatedImage(
        where, name, width, height, tuple(objects), problems=tuple(problems), object_unit="shape", number=number
    )


def _box(shape: _Shape) -> Box | None:
    """The bounding box; None of a shape that has no extent or too few points."""
    if shape.shape_type == "circle" and len(shape.points) == 2:
        (x, y), (edge_x, edge_y) = shape.points
        radius = ((edge_x - x) ** 2 + (edge_y - y) ** 2) ** 0.5
        return x - radius, y - radius, x + radius, y + radius
    least = {"rectangle": 2, "polygon": 3, "mask": 2}.get(shape.shape_type)
    if least is None or len(shape.points) < least:
        return None
    columns, rows = zip(*shape.points, strict=True)
    return min(columns), min(rows), max(columns), max(rows)


def sniff(sample: files.Sample) -> bool:
    """Whether a file is LabelMe's, or a folder holds some."""
    if sample.is_folder:
        first = next(iter(sorted(sample.path.glob("*.json"))), None)
        return first is not None and sniff(files.Sample(first))
    parts = sample.document
    return parts is not None and parts.images is None and bytes(parts.shapes) != b""
