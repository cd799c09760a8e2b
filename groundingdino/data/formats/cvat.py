"""CVAT's xml "for images 1.1": boxes, and the bounding boxes of polygons."""

from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

from groundingdino.data.formats import files
from groundingdino.data.formats.record import (
    NO_FLAGS,
    OCCLUDED,
    AnnotatedImage,
    AnnotatedObject,
    Box,
    Kind,
    Problem,
    Reading,
    ReadOptions,
    checked,
    unusable,
)

CORNERS = ("xtl", "ytl", "xbr", "ybr")
OTHER_SHAPES = frozenset(("polyline", "points", "cuboid", "ellipse", "skeleton", "mask"))


def read(path: Path, options: ReadOptions) -> Reading:
    """A CVAT file.

    Raises:
        ValueError: naming the file, if it is missing, something else, or tracks of a video.
    """
    root = files.read_xml(path)
    if root.find("track") is not None:
        raise ValueError(f'{path}: tracks of a video; export the task from CVAT as "CVAT for images 1.1"')
    images = root.findall("image")
    if root.tag != "annotations" or not images:
        raise ValueError(f"{path}: expected CVAT annotations with <image> elements")
    listed = [(label.findtext("name") or "").strip() for label in root.iter("label")]
    names = dict(enumerate(dict.fromkeys(name for name in listed if name)))

    def entries() -> Iterator[AnnotatedImage]:
        for number, element in enumerate(images, start=1):
            where = f"{path}: image {number}"
            try:
                entry = _convert(element, where, number, {name: label for label, name in names.items()})
            except ValueError as error:
                yield unusable(where, str(error), number=number)
                continue
            yield checked(entry, options.allow_outside)

    folder = options.images or files.guess_images(path, images[0].get("name", ""))
    return Reading(path, "cvat", entries, folder, names or None)


def _convert(image: Element, where: str, number: int, labels: dict[str, int]) -> AnnotatedImage:
    sides = [image.get(side, "") for side in ("width", "height")]
    if not all(side.isdecimal() and len(side) < 10 for side in sides):
        raise ValueError(f"width {sides[0]!r:.40} and height {sides[1]!r:.40} are not pixels")
    objects, problems = [], []
    for place, shape in enumerate(image, start=1):
        text = f"{shape.tag} {place}"
        name = shape.get("label", "")
        if shape.tag in OTHER_SHAPES:
            problems.append(Problem(Kind.NOT_A_BOX, where, f"{text} is left out"))
            continue
        if shape.tag not in ("box", "polygon"):
            continue
        if not name or (labels and name not in labels):
            problems.append(Problem(Kind.UNKNOWN_CATEGORY, where, f"{text}: label {name!r:.60} is not declared"))
            continue
        try:
            box = _box(shape)
        except ValueError:
            problems.append(Problem(Kind.MALFORMED, where, f"{text}: its coordinates are not numbers"))
            continue
        flags = frozenset((OCCLUDED,)) if shape.get("occluded") == "1" else NO_FLAGS
        objects.append(AnnotatedObject(box, labels.get(name, -1), name, place, flags))
    width, height = map(int, sides)
    name = image.get("name", "")
    return AnnotatedImage(where, name, width, height, tuple(objects), problems=tuple(problems), number=number)


def _box(shape: Element) -> Box:
    if shape.tag == "box":
        x1, y1, x2, y2 = (float(shape.get(corner, "")) for corner in CORNERS)
        return x1, y1, x2, y2
    points = [tuple(map(float, point.split(","))) for point in shape.get("points", "").split(";")]
    columns, rows = zip(*points, strict=True)
    return min(columns), min(rows), max(columns), max(rows)


def sniff(sample: files.Sample) -> bool:
    """Whether a file is CVAT's xml."""
    return b"<annotations" in sample.head and (b"<image" in sample.content or b"<track" in sample.content)
