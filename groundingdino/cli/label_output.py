"""What a labelling run leaves: the labels in the formats of other tools, a sample of pictures, histograms of scores.

Everything streams: memory does not grow with the number of images, but for YOLO's and VOC's lists of names.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal, Protocol, get_args
from xml.sax.saxutils import escape

import msgspec
import numpy as np

from groundingdino.data.formats import odvg
from groundingdino.data.formats.record import AnnotatedImage, AnnotatedObject, Reading
from groundingdino.data.formats.writers import write_voc, write_yolo
from groundingdino.inference.image_source import ImageRef, open_ref
from groundingdino.inference.remote import is_uri
from groundingdino.inference.results import to_json
from groundingdino.inference.visualize import comfortable_factor, draw_detections
from groundingdino.integrations.label_studio import to_label_studio
from groundingdino.runtime.files import atomic_file, write_text
from groundingdino.structures import Detections

logger = logging.getLogger(__name__)
LabelFormat = Literal["coco", "yolo", "voc", "odvg", "labelstudio", "jsonl"]
FILES = {"coco": "coco.json", "odvg": "odvg.jsonl", "labelstudio": "labelstudio.json", "jsonl": "labels.jsonl"}
SAMPLE = 16  # pictures
BINS = 20  # of a histogram
BAR_HEIGHT, BAR_WIDTH, TEXT_WIDTH = 30, 12, 220  # pixels of its drawing


@dataclass(frozen=True)
class Labelled:
    """One image with its labels."""

    position: int  # in the run's list
    ref: ImageRef
    width: int
    height: int
    found: Detections

    @property
    def image_id(self) -> int | str:
        """Of the annotation file that named it, else counted from 1."""
        return self.position + 1 if self.ref.image_id is None else self.ref.image_id


class _ReadImages(Protocol):
    def __call__(self, start: int = 0) -> Iterator[Labelled]:
        """The labelled images from a position on, read again from disk."""
        ...


@dataclass(frozen=True)
class Labels:
    """All labels of a run."""

    names: tuple[str, ...]
    root: Path  # folder of the images
    images: _ReadImages
    masks: Callable[[Labelled], list[dict[str, Any]]] | None = None  # of an image's labels, for COCO


def written_formats(folder: Path) -> dict[LabelFormat, Path]:
    """The formats that a run's folder has, and their files, or for YOLO and VOC their folders."""
    places = {to: folder / FILES.get(to, to) for to in get_args(LabelFormat)}
    return {to: path for to, path in places.items() if path.exists()}


def write_labels(labels: Labels, to: LabelFormat, folder: Path) -> Path:
    """Write the labels of a run into its folder; the file, or for YOLO and VOC the folder. It appears as a whole."""
    if to in ("yolo", "voc"):
        return _write_layout(labels, to, folder / to)
    path = folder / FILES[to]
    with atomic_file(path) as file:
        for piece in _STREAMS[to](labels):
            file.write(piece)
    if to == "odvg":
        names = {str(number): name for number, name in enumerate(labels.names)}
        write_text(odvg.map_path(path, path.name.split(".")[0]), odvg.dumps(names).decode() + "\n")
    return path


def _jsonl(labels: Labels) -> Iterator[bytes]:
    for image in labels.images():
        row: dict[str, Any] = {"image": image.ref.name, "width": image.width, "height": image.height}
        if image.ref.frame >= 0:
            row["frame"] = image.ref.frame
        yield json.dumps({**row, "detections": to_json(image.found)}, ensure_ascii=False).encode() + b"\n"


def _coco(labels: Labels) -> Iterator[bytes]:
    """Images in a first pass, annotations in a second, each with its score."""
    categories = [{"id": number, "name": name} for number, name in enumerate(labels.names, start=1)]
    yield b'{"info":{"description":"labelled by groundingdino"},"categories":' + msgspec.json.encode(categories)
    yield b',"images":['
    for count, image in enumerate(labels.images()):
        row: dict[str, Any] = {
            "id": image.image_id,
            "file_name": image.ref.name,
            "width": image.width,
            "height": image.height,
        }
        if image.ref.frame >= 0:
            row["frame"] = image.ref.frame
        yield b",\n" * (count > 0) + msgspec.json.encode(row)
    yield b'],"annotations":['
    number = 0
    for image in labels.images():
        codes: list[dict[str, Any]] = [] if labels.masks is None else labels.masks(image)
        for index, ((x1, y1, x2, y2), score, label) in enumerate(_rows(image.found)):
            number += 1
            box = [x1, y1, x2 - x1, y2 - y1]
            found: dict[str, Any] = {
                "id": number,
                "image_id": image.image_id,
                "category_id": label + 1,
                "bbox": box,
                "score": score,
            }
            if codes:
                found["segmentation"] = codes[index]
            yield b",\n" * (number > 1) + msgspec.json.encode({**found, "area": box[2] * box[3], "iscrowd": 0})
    yield b"]}\n"


def _odvg(labels: Labels) -> Iterator[bytes]:
    for image in labels.images():
        line = odvg.encode(_entry(image))
        for instance, score in zip(line["detection"]["instances"], image.found.scores.tolist(), strict=True):
            instance["score"] = score
        yield odvg.dumps(line) + b"\n"


def _labelstudio(labels: Labels) -> Iterator[bytes]:
    """Tasks with predictions. Images are served by Label Studio's local storage, whose root is the run's; URIs stay."""
    yield b"["
    for count, image in enumerate(labels.images()):
        prediction = to_label_studio(image.found, (image.width, image.height))
        remote = is_uri(image.ref.file) and image.ref.offset < 0
        place = image.ref.file if remote else f"/data/local-files/?d={image.ref.name}"
        task = {"data": {"image": place}, "predictions": [prediction]}
        yield b",\n" * (count > 0) + msgspec.json.encode(task)
    yield b"]\n"


_STREAMS: dict[str, Callable[[Labels], Iterator[bytes]]] = {
    "jsonl": _jsonl,
    "coco": _coco,
    "odvg": _odvg,
    "labelstudio": _labelstudio,
}


def _write_layout(labels: Labels, to: str, folder: Path) -> Path:
    """YOLO's or VOC's folder. VOC's objects have a tag `score`; YOLO's rows have no place for it: scores/ has them."""
    files = all(
        image.ref.offset < 0 and image.ref.frame < 0 and not is_uri(image.ref.file) for image in labels.images()
    )
    reading = Reading(
        folder, "labels", lambda: map(_entry, labels.images()), labels.root, dict(enumerate(labels.names))
    )
    shutil.rmtree(folder, ignore_errors=True)  # of other thresholds, or of a process that was killed
    written = (write_yolo if to == "yolo" else write_voc)({"all": reading}, folder, "link" if files else "leave")
    for problem in written.problems:
        logger.warning("%s", problem)
    if to == "yolo":
        for image in labels.images():
            path = (folder / "scores" / image.ref.name).with_suffix(".txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{score:.5f}\n" for score in image.found.scores.tolist()))
    return folder


def _entry(image: Labelled) -> AnnotatedImage:
    objects = tuple(
        AnnotatedObject(box, label, name, number, extra={"score": f"{score:.5f}"})
        for number, ((box, score, label), name) in enumerate(zip(_rows(image.found), image.found.names, strict=True), 1)
    )
    return AnnotatedImage(image.ref.name, image.ref.name, image.width, image.height, objects, number=image.position + 1)


def _rows(found: Detections) -> list[tuple[tuple[float, float, float, float], float, int]]:
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    return [((x1, y1, x2, y2), score, label) for (x1, y1, x2, y2), score, label in rows]


@dataclass
class Summary:
    """What one pass over the labels adds up: a histogram of scores for each name, and a random sample of images."""

    names: tuple[str, ...]
    images: int = 0
    histograms: Any = None  # (C, BINS) counts
    sample: list[Labelled] = field(default_factory=list)

    @classmethod
    def of(cls, labels: Labels) -> "Summary":
        """Of all labels; the sample is the same each time."""
        summary = cls(labels.names, histograms=np.zeros((len(labels.names), BINS), np.int64))
        draw = Random(0)
        for image in labels.images():
            summary.images += 1
            places = (image.found.scores * BINS).long().clamp(max=BINS - 1)
            np.add.at(summary.histograms, (image.found.labels.numpy(), places.numpy()), 1)
            place = len(summary.sample) if len(summary.sample) < SAMPLE else draw.randrange(summary.images)
            if place == len(summary.sample):
                summary.sample.append(image)
            elif place < SAMPLE:
                summary.sample[place] = image
        return summary

    def save(self, folder: Path) -> None:
        """`scores.svg`, `scores.json` and `sample/*.jpg`."""
        counts = {name: row.tolist() for name, row in zip(self.names, self.histograms, strict=True)}
        write_text(folder / "scores.json", json.dumps({"bins": BINS, "counts": counts}, ensure_ascii=False) + "\n")
        write_text(folder / "scores.svg", self._drawing())
        (folder / "sample").mkdir(exist_ok=True)
        for path in (folder / "sample").glob("*.jpg"):
            path.unlink()
        for image in self.sample:
            picture = open_ref(image.ref)
            with atomic_file(folder / "sample" / f"{image.position:07d}.jpg") as file:
                drawn = draw_detections(picture, image.found, enlarge=comfortable_factor(picture.size))
                drawn.save(file, format="jpeg")

    def _drawing(self) -> str:
        """A row of bars for each name that was found, the most frequent first."""
        totals = self.histograms.sum(axis=1)
        order = [index for index in np.argsort(-totals, kind="stable") if totals[index]]
        width, height = TEXT_WIDTH + BINS * BAR_WIDTH + 10, max(1, len(order)) * (BAR_HEIGHT + 6) + 20
        lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">']
        for row, index in enumerate(order):
            base = (row + 1) * (BAR_HEIGHT + 6)
            text = escape(f"{self.names[index][:28]} ({totals[index]:,})")
            lines.append(f'<text x="4" y="{base - 8}" font-size="12">{text}</text>')
            for place, count in enumerate(self.histograms[index]):
                bar = BAR_HEIGHT * count / self.histograms[index].max()
                x = TEXT_WIDTH + place * BAR_WIDTH
                lines.append(
                    f'<rect x="{x}" y="{base - bar:.1f}" width="{BAR_WIDTH - 1}" height="{bar:.1f}" fill="#36c"/>'
                )
        for tenth in range(0, 11, 2):
            x = TEXT_WIDTH + tenth * BINS * BAR_WIDTH // 10
            lines.append(f'<text x="{x}" y="{height - 4}" font-size="10" text-anchor="middle">{tenth / 10}</text>')
        return "\n".join([*lines, "</svg>\n"])
