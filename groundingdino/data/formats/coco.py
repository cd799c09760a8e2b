"""COCO's json and LVIS's, which is the same with other fields: images, annotations with boxes, categories with ids."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from groundingdino.data.formats import files
from groundingdino.data.formats.record import (
    CROWD,
    DIFFICULT,
    NO_FLAGS,
    OCCLUDED,
    TRUNCATED,
    AnnotatedImage,
    AnnotatedObject,
    Kind,
    Problem,
    Reading,
    ReadOptions,
    checked,
    unusable,
)

Number = int | float
Id = int | str
Json = dict[str, Any]
COCO_HOST = "http://images.cocodataset.org/"


class Document(msgspec.Struct):
    """An annotation file, its entries not yet read."""

    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw] = []
    categories: list[msgspec.Raw] = []


class Image(msgspec.Struct):
    """An `images` entry."""

    id: Id
    file_name: str = ""
    width: int = 0
    height: int = 0
    coco_url: str = ""


class _Attributes(msgspec.Struct, gc=False):
    occluded: bool = False
    truncated: bool = False


class Annotation(msgspec.Struct, gc=False):
    """An `annotations` entry."""

    image_id: Id
    category_id: int
    bbox: tuple[Number, Number, Number, Number]  # x, y, width, height
    id: Id | None = None
    iscrowd: int = 0
    ignore: int = 0
    area: Number | None = None
    attributes: _Attributes | None = None


class Category(msgspec.Struct):
    """A `categories` entry."""

    id: int
    name: str


Numbered = tuple[int, msgspec.Raw, Annotation]


def read(path: Path, options: ReadOptions) -> Reading:
    """A COCO file.

    Raises:
        ValueError: naming the file, if it is missing or in another format.
    """
    return _read(path, options, "coco")


def read_lvis(path: Path, options: ReadOptions) -> Reading:
    """An LVIS file: images are named by their `coco_url`, such as train2017/000000391895.jpg.

    Raises:
        ValueError: naming the file, if it is missing or in another format.
    """
    return _read(path, options, "lvis")


def _read(path: Path, options: ReadOptions, format_name: str) -> Reading:
    try:
        document = files.read_json(path, Document)
    except ValueError as error:
        text = str(error).removeprefix(f"{path}: ")
        if text.startswith(("Expected `object`", "Object missing")):
            text = f'expected COCO annotations, an object with "images", "annotations" and "categories" ({text})'
        raise ValueError(f"{path}: {text}") from error
    names, problems = _read_categories(path, document.categories)
    grouped, more = _read_annotations(path, document.annotations, names)
    problems += more
    images, ids, unread = [], set(), []
    for number, raw in enumerate(document.images, start=1):
        where = f"{path}: images entry {number}"
        try:
            image = files.decode(raw, Image)
        except ValueError as error:
            unread.append(unusable(where, str(error), number=number))
            continue
        if image.id in ids:
            unread.append(unusable(where, f"id {_short(image.id)} was used before", Kind.DUPLICATE_ID, number))
            continue
        ids.add(image.id)
        images.append((number, raw, image))
    for image_id, group in grouped.items():
        if image_id not in ids:
            text = f"no image has the id {_short(image_id)}"
            problems += [Problem(Kind.MALFORMED, f"{path}: annotations entry {n}", text) for n, _, _ in group]

    def entries() -> Iterator[AnnotatedImage]:
        yield from unread
        for number, raw, image in images:
            file_name = image.file_name
            if format_name == "lvis" or not file_name:
                file_name = image.coco_url.removeprefix(COCO_HOST) or file_name
            objects = tuple(_convert(numbered, names) for numbered in grouped.get(image.id, ()))
            entry = AnnotatedImage(
                f"{path}: images entry {number}",
                file_name,
                image.width,
                image.height,
                objects,
                object_unit="annotations entry",
                box_form="xywh",
                number=number,
                image_id=image.id,
                extra=raw,
            )
            yield checked(entry, options.allow_outside)

    folder = options.images or files.guess_images(path, images[0][2].file_name if images else "")
    return Reading(path, format_name, entries, folder, names, tuple(problems), {"document": path})


def _read_categories(path: Path, raws: Iterable[msgspec.Raw]) -> tuple[dict[int, str], list[Problem]]:
    names: dict[int, str] = {}
    problems = []
    for number, raw in enumerate(raws, start=1):
        where = f"{path}: categories entry {number}"
        try:
            category = files.decode(raw, Category)
        except ValueError as error:
            problems.append(Problem(Kind.MALFORMED, where, str(error)))
            continue
        if category.id in names:
            problems.append(Problem(Kind.DUPLICATE_ID, where, f"category id {category.id} was used before"))
        names.setdefault(category.id, category.name)
    return names, problems


def _read_annotations(
    path: Path, raws: Iterable[msgspec.Raw], names: Mapping[int, str]
) -> tuple[dict[Id, list[Numbered]], list[Problem]]:
    grouped: dict[Id, list[Numbered]] = defaultdict(list)
    ids: set[Id] = set()
    problems = []
    for number, raw in enumerate(raws, start=1):
        try:
            annotation = files.decode(raw, Annotation)
        except ValueError as error:
            problems.append(Problem(Kind.MALFORMED, f"{path}: annotations entry {number}", str(error)))
            continue
        if annotation.id is not None and annotation.id in ids:
            text = f"annotation id {_short(annotation.id)} was used before"
            problems.append(Problem(Kind.DUPLICATE_ID, f"{path}: annotations entry {number}", text))
        elif annotation.id is not None:
            ids.add(annotation.id)
        if annotation.category_id not in names:
            text = f"category_id {_short(annotation.category_id)} is not among the categories"
            problems.append(Problem(Kind.UNKNOWN_CATEGORY, f"{path}: annotations entry {number}", text))
            continue
        grouped[annotation.image_id].append((number, raw, annotation))
    return grouped, problems


def _convert(numbered: Numbered, names: Mapping[int, str]) -> AnnotatedObject:
    number, raw, annotation = numbered
    x, y, w, h = annotation.bbox
    if annotation.area is not None and annotation.area <= 0:
        w = h = 0  # mmdet leaves it out
    flags = NO_FLAGS
    if annotation.iscrowd or annotation.ignore or annotation.attributes:
        attributes = annotation.attributes or _Attributes()
        told = {
            CROWD: annotation.iscrowd,
            DIFFICULT: annotation.ignore,
            OCCLUDED: attributes.occluded,
            TRUNCATED: attributes.truncated,
        }
        flags = frozenset(flag for flag, value in told.items() if value)
    label = annotation.category_id
    return AnnotatedObject((x, y, x + w, y + h), label, names[label], number, flags, raw)


def _short(value: Id) -> str:
    return repr(value)[:60]


def sniff(sample: files.Sample) -> bool:
    """Whether a JSON document has images, and neither LVIS's fields nor captions."""
    return sample.is_document and not sniff_lvis(sample) and "caption" not in sample.first_image_keys


def sniff_lvis(sample: files.Sample) -> bool:
    """Whether a JSON document has LVIS's fields."""
    return bool(sample.first_image_keys & {"neg_category_ids", "not_exhaustive_category_ids"}) or (
        bool(sample.first_category_keys & {"frequency", "synset"}) and "caption" not in sample.first_image_keys
    )


def encode(reading: Reading, entries: Iterable[AnnotatedImage]) -> Json:
    """Entries as a COCO document. What a COCO file says beyond boxes (masks, licences, ids) is kept."""
    images, annotations = list[Json](), list[Json]()
    original = reading.format in ("coco", "lvis")
    offset = int(not original and 0 in reading.categories)  # COCO counts categories from 1
    for place, entry in enumerate(entries, start=1):
        kept = _as_in_file(entry.extra) if original else {}
        image_id = entry.image_id if original else place
        images.append(
            {**kept, "id": image_id, "file_name": entry.file_name, "width": entry.width, "height": entry.height}
        )
        for thing in entry.objects:
            annotation = _encode_object(thing, original)
            annotation |= {"image_id": image_id, "category_id": reading.category_of(thing) + offset}
            annotation.setdefault("id", len(annotations) + 1)
            annotations.append(annotation)
    document = _other_parts(reading.path) if original else {}
    if reading.extra.get("renamed"):
        document["categories"] = [{"id": number, "name": name} for number, name in reading.categories.items()]
    document.setdefault("info", {"description": f"converted from {reading.format}"})
    document |= {"images": images, "annotations": annotations}
    if not original:
        document["categories"] = [
            {"id": number + offset, "name": name} for number, name in sorted(reading.categories.items())
        ]
    return document


def _encode_object(thing: AnnotatedObject, original: bool) -> Json:
    x1, y1, x2, y2 = thing.box
    bbox = [x1, y1, x2 - x1, y2 - y1]
    kept = _as_in_file(thing.extra) if original else {}
    if kept:
        x, y, w, h = as_read = files.decode(thing.extra, Annotation).bbox
        unchanged = (x, y, x + w, y + h) == thing.box
        return {**kept, "bbox": as_read} if unchanged else {**kept, "bbox": bbox, "area": bbox[2] * bbox[3]}
    annotation: Json = {"bbox": bbox, "area": bbox[2] * bbox[3], "iscrowd": int(CROWD in thing.flags)}
    if DIFFICULT in thing.flags:
        annotation["ignore"] = 1
    attributes = {flag: True for flag in (OCCLUDED, TRUNCATED) if flag in thing.flags}
    return {**annotation, "attributes": attributes} if attributes else annotation


def _as_in_file(raw: msgspec.Raw | None) -> Json:
    """An entry's fields; none where one that we do not read is damaged."""
    try:
        return files.decode(raw, dict[str, Any]) if raw is not None else {}
    except ValueError:
        return {}


def _other_parts(path: Path) -> Json:
    """What a document holds beside images and annotations, not decoded."""
    document = files.read_json(path, dict[str, msgspec.Raw])
    return {name: part for name, part in document.items() if name not in ("images", "annotations")}
