"""Find things in images: JSON lines to standard output, or to a file with --json.

    groundingdino predict photo.jpg --checkpoint model.safetensors --categories "cat, dog" --save out.jpg
    groundingdino predict photos/ --refer "the man on the left" --json found.jsonl

Exit code 2: something that you can fix, in one line. 1: some images could not be read; the others were done.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import tyro

from groundingdino.cli import console, loading

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

if TYPE_CHECKING:
    from PIL import Image

    from groundingdino.inference.predictor import DetectionFilter, Predictor
    from groundingdino.inference.prompts import Prompt
    from groundingdino.structures import Detections


@dataclass(frozen=True)
class Arguments:
    """What to look for, where, and what to do with it."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[IMAGE ...]")]
    """image files and folders"""
    checkpoint: Path | None = None
    """default: the only .safetensors in this folder, weights/ or checkpoints/"""
    categories: str | None = None
    """what to look for: names, separated by commas"""
    names: str | None = None
    """what to look for: a file of names (names.txt, names.yaml), or coco, lvis, objects365, v3det, odinw/NAME"""
    refer: str | None = None
    """what to look for: a sentence about one object"""
    phrases: str | None = None
    """what to look for: the noun phrases of this caption"""
    caption: str | None = None
    """what to look for: the --spans of this caption"""
    spans: tuple[str, ...] = ()
    """character spans START:END of the caption, one an object; START:END,START:END is one object"""
    scoring: Literal["max", "subject", "llmdet"] = "max"
    """score of --refer: best token of the sentence, mean over its subject, or LLMDet's, which adds a bonus for sides"""
    threshold: float | None = None
    """least score; default 0.3, and 0 for --refer"""
    top_k: int | None = None
    """most detections of an image; default all, and 1 for --refer"""
    nms: float | None = None
    """IoU over which the worse of two boxes goes; default off"""
    nms_across_labels: bool = False
    """let boxes of different labels compete, too"""
    batch_size: int = 1
    """images that run together; alone, a result depends on its image only"""
    device: str = "auto"
    """cpu, cuda, cuda:1, npu, ..."""
    precision: loading.Precision = "fp32"
    """of weights and arithmetic; -mixed keeps the weights in float32"""
    scale: tuple[int, int] | None = None
    """short and long side in pixels that images must fit into; default is the checkpoint's, mostly 800 1333"""
    save: Path | None = None
    """the picture with boxes, a small one enlarged; for several images a folder"""
    json: Path | None = None
    """file for the JSON lines"""


def prompt_maker(arguments: Arguments) -> Callable[[], "Prompt"]:
    """Makes the prompt that the options name. ValueError at once unless it is exactly one: torch is not needed yet."""
    spans = [_parse_span(text) for text in arguments.spans]

    def make() -> "Prompt":
        from groundingdino.inference.prompts import Categories, Phrases, Referring, Spans
        from groundingdino.inference.vocabulary import read_vocabulary

        if arguments.names is not None:
            return read_vocabulary(arguments.names)
        if arguments.categories is not None:
            return Categories([name.strip() for name in arguments.categories.split(",") if name.strip()])
        if arguments.refer is not None:
            return Referring(arguments.refer, arguments.scoring)
        if arguments.phrases is not None:
            return Phrases(arguments.phrases)
        return Spans(arguments.caption or "", spans)

    options = (arguments.categories, arguments.names, arguments.refer, arguments.phrases)
    given = sum(option is not None for option in options) + (arguments.caption is not None or bool(spans))
    if given != 1:
        raise ValueError(
            f"give one of --categories, --names, --refer, --phrases and --caption with --spans, got {given}"
        )
    return make


def _parse_span(text: str) -> list[tuple[int, int]]:
    try:
        pairs = [tuple(int(number) for number in piece.split(":")) for piece in text.split(",")]
        return [(start, end) for start, end in pairs]
    except ValueError as error:
        raise ValueError(f"--spans {text!r}: write START:END, or START:END,START:END") from error


def image_paths(images: Sequence[Path]) -> list[Path]:
    """Files as they are, folders as the images in them."""
    from groundingdino.inputs.images import image_files

    paths = [path for given in images for path in (image_files(given) if given.is_dir() else [given])]
    if not paths:
        raise ValueError(f"no image found in {', '.join(str(path) for path in images)}")
    return paths


def predict(arguments: Arguments) -> int:
    """Detections of every image that can be read. The exit code."""
    if not arguments.images:
        raise ValueError("no image given: name image files or folders")
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size {arguments.batch_size}: at least one image runs at a time")
    loading.check_scale(arguments.scale)
    make_prompt, checkpoint = prompt_maker(arguments), loading.find_checkpoint(arguments.checkpoint)
    paths = image_paths(arguments.images)
    pictures = picture_paths(arguments.save, paths)
    refuse_overwriting(arguments, list(pictures.values()), [checkpoint, *paths])
    written = [*pictures.values(), *([arguments.json] if arguments.json else [])]
    for folder in {path.parent for path in written}:
        folder.mkdir(parents=True, exist_ok=True)
    prompt = make_prompt()
    from tqdm import tqdm

    from groundingdino.inference.predictor import DetectionFilter
    from groundingdino.inference.results import to_json
    from groundingdino.inference.visualize import comfortable_factor, draw_detections

    limits = DetectionFilter(arguments.threshold, arguments.top_k, arguments.nms, not arguments.nms_across_labels)
    predictor = loading.load_predictor(checkpoint, arguments.device, arguments.precision, arguments.scale)
    bar = tqdm(total=len(paths), unit="image", disable=len(paths) < 2 or not sys.stderr.isatty())
    unreadable = 0
    with _lines_file(arguments.json) as lines, bar:
        for path, image, found in _answers(predictor, paths, prompt, limits, arguments.batch_size):
            bar.update()
            if isinstance(found, ValueError):
                unreadable += 1
                bar.write(f"skipped: {console.one_line(found)}", file=sys.stderr)
                continue
            _write_line(lines, {"image": str(path), "detections": to_json(found)})
            if image is not None and path in pictures:
                _save(draw_detections(image, found, enlarge=comfortable_factor(image.size)), pictures[path])
    return 1 if unreadable else 0


def refuse_overwriting(arguments: Arguments, pictures: Sequence[Path], inputs: Sequence[Path]) -> None:
    """ValueError where a file to write is one to read, under any name, or where both options name one file."""
    save, json_file = arguments.save, arguments.json
    folders = {identity(path) for path in arguments.images if path.is_dir()}
    if save is not None and identity(save) in folders:
        raise ValueError(f"--save {save} is the folder of the images: name another one for the pictures")
    read, drawn = {identity(path) for path in inputs}, {identity(path) for path in pictures}
    for option, path in [*(("--save", path) for path in pictures), *([("--json", json_file)] if json_file else [])]:
        if identity(path) in read:
            raise ValueError(f"{option} would overwrite {path}, which is read: name another place")
        if path.is_dir():
            raise ValueError(f"{option} would write {path}, which is a folder: name another place")
    if json_file is not None and identity(json_file) in drawn:
        raise ValueError(f"--json and --save both write {json_file}")


def identity(path: Path) -> tuple[int, int] | str:
    """Equal for all names of one file: its number, and the real path of what does not exist."""
    try:
        status = path.stat()
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def _lines_file(path: Path | None) -> AbstractContextManager[IO[str]]:
    return nullcontext(sys.stdout) if path is None else open(path, "w", encoding="utf-8")


def _write_line(lines: IO[str], row: dict[str, Any]) -> None:
    text = json.dumps(row, ensure_ascii=False)
    lines.write(text.encode("utf-8", "backslashreplace").decode() + "\n")  # half a surrogate pair, as JSON writes it
    lines.flush()


def _save(picture: "Image.Image", path: Path) -> None:
    from groundingdino.runtime.files import atomic_file

    with atomic_file(path) as file:
        picture.save(file, format=picture_format(path))


def picture_format(path: Path) -> str:
    """Pillow's name of the format that the suffix stands for."""
    kind = path.suffix.lower().removeprefix(".")
    return {"jpg": "jpeg", "tif": "tiff"}.get(kind, kind)


def picture_paths(save: Path | None, paths: list[Path]) -> dict[Path, Path]:
    """Where each image's picture goes: to `save` itself, or into that folder under the image's name."""
    if save is None:
        return {}
    if len(paths) == 1 and save.suffix and not save.is_dir():
        if save.suffix.lower() not in PICTURE_SUFFIXES:
            raise ValueError(f"--save {save}: a picture ends in {', '.join(PICTURE_SUFFIXES)}; several go to a folder")
        return {paths[0]: save}
    pictures: dict[Path, Path] = {}
    for path in paths:
        number, name = 1, path.stem
        while save / f"{name}.jpg" in pictures.values():
            number, name = number + 1, f"{path.stem}_{number + 1}"
        pictures[path] = save / f"{name}.jpg"
    return pictures


def _answers(
    predictor: "Predictor", paths: list[Path], prompt: "Prompt", limits: "DetectionFilter", batch_size: int
) -> Iterator[tuple[Path, "Image.Image | None", "Detections | ValueError"]]:
    """(path, image, detections), or (path, None, why not) where an image cannot be read."""
    from groundingdino.inputs.images import load_image

    encoded = predictor.encode_prompt(prompt)
    remaining = iter(paths)
    while group := list(islice(remaining, max(1, batch_size))):
        images = {}
        for path in group:
            try:
                images[path] = load_image(path)
            except ValueError as error:
                yield path, None, error
        found = predictor.stream(list(images.values()), encoded, limits, max(1, batch_size))
        for (path, image), detections in zip(images.items(), found, strict=True):
            yield path, image, detections


def main(arguments: Sequence[str], prog: str = "groundingdino predict") -> int:
    """The exit code."""
    return console.run(prog, lambda: predict(console.parse(Arguments, arguments, prog, description=__doc__)))
