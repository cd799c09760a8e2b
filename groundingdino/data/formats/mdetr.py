"""MDETR's annotation format, and its entries as ODVG lines (mmdet `tools/dataset_converters/refcoco2odvg.py`).

MDETR holds one `images` entry per referring expression, with the character spans (`tokens_positive`) of what each
annotated box is. ODVG holds one line per image with a caption and its `regions`: phrase, spans, one or several boxes.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]
MIN_SIDE = 1.0  # pixels; thinner boxes are left out, as mmdet does


@dataclass(frozen=True)
class Converted:
    """What became of one `images` entry."""

    number: int  # of the entry in the document, from 1
    line: Json | None  # the ODVG line; None where no box of the entry is usable
    problems: tuple[str, ...]  # what was left out and why


def read_document(path: Path) -> Json:
    """An MDETR annotation file. ValueError, naming the file, if it is missing or something else."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such annotation file") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a JSON document ({error})") from error
    if not isinstance(document, dict) or not {"images", "annotations"} <= document.keys():
        raise ValueError(f'{path}: expected an MDETR annotation file, an object with "images" and "annotations"')
    for part, field in (("images", "id"), ("annotations", "image_id")):
        wrong = next((n for n, item in enumerate(document[part], start=1) if field not in item), None)
        if wrong is not None:
            raise ValueError(f"{path}: {part} entry {wrong}: field {field!r} is missing")
    return document


def annotations_by_image(document: Json) -> dict[Any, list[Json]]:
    """Image id -> its annotations, in the order of the file."""
    grouped: dict[Any, list[Json]] = defaultdict(list)
    for annotation in document["annotations"]:
        grouped[annotation["image_id"]].append(annotation)
    return grouped


def convert(document: Json) -> Iterator[Converted]:
    """Every `images` entry in the order of its id.

    Raises:
        ValueError: naming the entry, if a field that the format requires is missing or malformed.
    """
    grouped = annotations_by_image(document)
    images = enumerate(document["images"], start=1)
    for number, image in sorted(images, key=lambda numbered: numbered[1]["id"]):
        try:
            yield _convert_image(number, image, grouped.get(image["id"], []))
        except KeyError as error:
            raise ValueError(f"images entry {number} (id {image['id']}): field {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"images entry {number} (id {image['id']}): malformed ({error})") from error


def _convert_image(number: int, image: Json, annotations: list[Json]) -> Converted:
    annotations = [annotation for annotation in annotations if not annotation.get("iscrowd", 0)]
    if not annotations:
        return Converted(number, None, ("it has no annotation",))
    problems = tuple(filter(None, (_problem(image, annotation) for annotation in annotations)))
    if all(min(annotation["bbox"][2:]) <= MIN_SIDE for annotation in annotations):
        return Converted(number, None, problems or ("all of its boxes are one pixel thin",))
    regions: dict[str, Json] = {}
    for annotation in annotations:
        if _problem(image, annotation) is None:
            _add_region(regions, image, annotation)
    line = {
        "filename": image["file_name"],
        "height": int(image["height"]),
        "width": int(image["width"]),
        "grounding": {"caption": image["caption"], "regions": list(regions.values())},
    }
    return Converted(number, line, problems)


def _problem(image: Json, annotation: Json) -> str | None:
    """Why a box cannot be used, or None."""
    x, y, w, h = annotation["bbox"]
    width, height = int(image["width"]), int(image["height"])
    shown = f"box [{x:g}, {y:g}, {w:g}, {h:g}] (x, y, width, height)"
    if max(0, min(x + w, width) - max(x, 0)) * max(0, min(y + h, height) - max(y, 0)) == 0:
        return f"{shown} lies outside the {width}x{height} image"
    if annotation.get("area", w * h) <= 0 or w < MIN_SIDE or h < MIN_SIDE:
        return f"{shown} has no area"
    return None


def _add_region(regions: dict[str, Json], image: Json, annotation: Json) -> None:
    """Boxes with the same phrase become one region with several boxes, which keeps the first one's spans."""
    x, y, w, h = annotation["bbox"]
    box = [x, y, min(x + w, int(image["width"])), min(y + h, int(image["height"]))]  # mmdet clips these two sides only
    spans = sorted(annotation["tokens_positive"], key=lambda span: span[0])
    pieces = _phrase_pieces(image["caption"], spans)
    key = " ".join(pieces)
    if key not in regions:
        phrase = pieces[0] if len(pieces) == 1 else pieces
        regions[key] = {"bbox": box, "phrase": phrase, "tokens_positive": spans}
    elif isinstance(regions[key]["bbox"][0], list):
        regions[key]["bbox"].append(box)
    else:
        regions[key]["bbox"] = [regions[key]["bbox"], box]


def _phrase_pieces(caption: str, spans: list[list[int]]) -> list[str]:
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
