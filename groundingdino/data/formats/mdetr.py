"""MDETR's json (RefCOCO, RefCOCO+, RefCOCOg, GoldG): one `images` entry per caption, with the characters
(`tokens_positive`) that name each annotated box."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec

from groundingdino.data.formats import files
from groundingdino.data.formats.record import (
    CROWD,
    MIN_SIDE,
    AnnotatedImage,
    AnnotatedObject,
    Kind,
    Problem,
    Reading,
    ReadOptions,
    checked,
    unusable,
)
from groundingdino.inputs.text import Spans

Number = int | float
Id = int | str


class Document(msgspec.Struct):
    """An annotation file, its entries not yet read."""

    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]


class Image(msgspec.Struct):
    """An `images` entry: one caption of one image."""

    id: Id
    file_name: str
    width: int
    height: int
    caption: str
    dataset_name: str = "refcoco"


class Annotation(msgspec.Struct):
    """A box of a caption and the characters that name it."""

    image_id: Id
    bbox: tuple[Number, Number, Number, Number]  # x, y, width, height
    tokens_positive: list[tuple[int, int]] = []
    iscrowd: int = 0
    area: Number | None = None


def read(path: Path, options: ReadOptions) -> Reading:
    """An MDETR file; its entries come in the order of their ids, as mmdet's converters take them.

    Raises:
        ValueError: naming the file, if it is missing or in another format.
    """
    document = read_document(path)
    grouped: dict[Id, list[tuple[int, Annotation]]] = defaultdict(list)
    problems, images = [], []
    for number, raw in enumerate(document.annotations, start=1):
        try:
            annotation = files.decode(raw, Annotation)
            grouped[annotation.image_id].append((number, annotation))
        except ValueError as error:
            problems.append(Problem(Kind.MALFORMED, f"{path}: annotations entry {number}", str(error), fatal=True))
    unread, ids = [], set()
    for number, raw in enumerate(document.images, start=1):
        where = f"{path}: images entry {number}"
        try:
            image = files.decode(raw, Image)
        except ValueError as error:
            unread.append(unusable(where, str(error), number=number))
            continue
        if image.id in ids:
            unread.append(unusable(where, f"id {image.id!r} was used before", Kind.DUPLICATE_ID, number))
            continue
        ids.add(image.id)
        images.append((number, image))
    images.sort(key=lambda numbered: (isinstance(numbered[1].id, str), numbered[1].id))
    strays = [numbered for image_id, group in grouped.items() if image_id not in ids for numbered in group]
    problems += [
        Problem(Kind.MALFORMED, f"{path}: annotations entry {number}", f"no image has the id {annotation.image_id!r}")
        for number, annotation in strays
    ]

    def entries() -> Iterator[AnnotatedImage]:
        yield from unread
        for number, image in images:
            where = f"{path}: images entry {number}"
            yield _convert(where, number, image, grouped.get(image.id, []), options.allow_outside)

    name = images[0][1].file_name if images else ""
    folder = options.images or files.guess_images(path, name)
    return Reading(path, "mdetr", entries, folder, problems=tuple(problems))


def read_document(path: Path) -> Document:
    """The file's parts. ValueError, naming the file, if it is missing or something else."""
    try:
        return files.read_json(path, Document)
    except ValueError as error:
        text = str(error).removeprefix(f"{path}: ")
        if text.startswith(("Expected `object`", "Object missing")):
            text = f'expected an MDETR annotation file, an object with "images" and "annotations" ({text})'
        raise ValueError(f"{path}: {text}") from error


def _convert(
    where: str, number: int, image: Image, annotations: list[tuple[int, Annotation]], allow_outside: bool
) -> AnnotatedImage:
    objects, spans, problems = [], list[Spans](), []
    for place, annotation in annotations:
        wrong = next((s for s in annotation.tokens_positive if not 0 <= s[0] < s[1] <= len(image.caption)), None)
        if wrong is not None:
            size = len(image.caption)
            text = f"span {str(list(wrong))[:60]} is not inside the caption of {size} characters"
            return unusable(where, f"annotations entry {place}: {text}", Kind.SPAN, number)
        pieces = tuple(sorted(annotation.tokens_positive, key=lambda span: span[0]))
        x, y, w, h = annotation.bbox
        if annotation.area is not None and annotation.area <= 0:
            w = h = 0  # mmdet leaves it out
        flags = frozenset((CROWD,)) if annotation.iscrowd else frozenset()
        if not pieces:
            problems.append(Problem(Kind.UNNAMED, where, f"annotations entry {place}: no tokens_positive name it"))
        name = " ".join(image.caption[start:end] for start, end in pieces)
        objects.append(AnnotatedObject((x, y, x + w, y + h), len(spans), name, place, flags))
        spans.append(pieces)
    entry = checked(
        AnnotatedImage(
            where,
            image.file_name,
            image.width,
            image.height,
            tuple(objects),
            image.caption,
            tuple(spans),
            tuple(problems),
            object_unit="annotations entry",
            box_form="xywh",
            number=number,
            image_id=image.id,
            extra=image.dataset_name,
        ),
        allow_outside,
    )
    counted = [annotation for _, annotation in annotations if not annotation.iscrowd]
    if all(min(annotation.bbox[2:]) <= MIN_SIDE for annotation in counted):  # as mmdet does, also where there is none
        text = "all of its boxes are one pixel thin" if counted else "it has no annotation"
        fatal = Problem(Kind.NO_OBJECTS, where, text, fatal=True)
        return msgspec.structs.replace(entry, objects=(), problems=(*entry.problems, fatal))
    return entry


def sniff(sample: files.Sample) -> bool:
    """Whether a JSON document's images have captions."""
    return "caption" in sample.first_image_keys
