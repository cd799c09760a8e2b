"""Ask a checkpoint from the command line.

    python -m groundingdino predict photo.jpg --checkpoint model.safetensors --categories "cat, dog" --save out.jpg
    python -m groundingdino predict photos/ --refer "the man on the left" --json found.jsonl
    python -m groundingdino info model.safetensors
    python -m groundingdino demo --checkpoint model.safetensors

Exit code 2: something that you can mend, in one line. 1: some images could not be read; the others were done.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from PIL import Image

    from groundingdino.inference.predictor import DetectionFilter, Predictor
    from groundingdino.inference.prompts import Prompt
    from groundingdino.structures import Detections

CHECKPOINT_PLACES = (".", "weights", "checkpoints")  # looked into where no --checkpoint is given


@dataclass(frozen=True)
class Predict:
    """Find things in pictures: JSON lines to standard output, or to a file with --json."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """image files and folders"""
    checkpoint: Path | None = None
    """default: the only .safetensors in this folder, weights/ or checkpoints/"""
    categories: str | None = None
    """what to look for: names, separated by commas"""
    refer: str | None = None
    """what to look for: a sentence about one object"""
    phrases: str | None = None
    """what to look for: the noun phrases of this caption"""
    caption: str | None = None
    """what to look for: the --spans of this caption"""
    spans: tuple[str, ...] = ()
    """character spans START:END of the caption, one an object; START:END,START:END is one object"""
    scoring: Literal["max", "subject"] = "max"
    """score of --refer: best token of the sentence, or mean over its subject"""
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
    precision: Literal["fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed"] = "fp32"
    """of weights and arithmetic; -mixed keeps the weights in float32"""
    scale: tuple[int, int] | None = None
    """short and long side in pixels that images must fit into; default is the checkpoint's, mostly 800 1333"""
    save: Path | None = None
    """the picture with boxes, a small one enlarged; for several images a folder"""
    json: Path | None = None
    """file for the JSON lines"""


@dataclass(frozen=True)
class Info:
    """Say what a checkpoint is: size, provenance, config."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """a .safetensors file"""
    json: bool = False
    """as JSON"""


@dataclass(frozen=True)
class Demo:
    """Serve a page to try a model in the browser; needs the extra: pip install "groundingdino[demo]"."""

    checkpoint: Path | None = None
    """default: the only .safetensors in this folder, weights/ or checkpoints/"""
    samples: Path | None = None
    """folder of pictures to choose from"""
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 lets other machines in"""
    port: int = 7860
    """port to listen at"""
    device: str = "auto"
    """cpu, cuda, cuda:1, npu, ..."""
    precision: Literal["fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed"] = "fp32"
    """of weights and arithmetic"""


def find_checkpoint(given: Path | None) -> Path:
    """The given one, or the only one near. ValueError where there are none or several."""
    if given is not None:
        return given
    near = sorted(path for place in CHECKPOINT_PLACES for path in Path(place).glob("*.safetensors"))
    if len(near) == 1:
        return near[0]
    found = ", ".join(str(path) for path in near) or "none"
    raise ValueError(f"which checkpoint? Give --checkpoint PATH (found in {', '.join(CHECKPOINT_PLACES)}: {found})")


def prompt_of(command: Predict) -> "Prompt":
    """The prompt that the options name. ValueError unless it is exactly one."""
    from groundingdino.inference.prompts import Categories, Phrases, Referring, Spans

    given: list[Prompt] = []
    if command.categories is not None:
        given.append(Categories([name.strip() for name in command.categories.split(",") if name.strip()]))
    if command.refer is not None:
        given.append(Referring(command.refer, command.scoring))
    if command.phrases is not None:
        given.append(Phrases(command.phrases))
    if command.caption is not None or command.spans:
        given.append(Spans(command.caption or "", [_parse_span(text) for text in command.spans]))
    if len(given) != 1:
        raise ValueError(f"give one of --categories, --refer, --phrases and --caption with --spans, got {len(given)}")
    return given[0]


def _parse_span(text: str) -> list[tuple[int, int]]:
    try:
        pairs = [tuple(int(number) for number in piece.split(":")) for piece in text.split(",")]
        return [(start, end) for start, end in pairs]
    except ValueError as error:
        raise ValueError(f"--spans {text!r}: write START:END, or START:END,START:END") from error


def image_paths(images: Iterable[Path]) -> list[Path]:
    """Files as they are, folders as the images in them."""
    from groundingdino.inputs.images import image_files

    paths = [path for given in images for path in (image_files(given) if given.is_dir() else [given])]
    if not paths:
        raise ValueError("no image given: name image files or folders")
    return paths


def run_predict(command: Predict) -> int:
    """Detections of every image that can be read. The exit code."""
    from tqdm import tqdm

    prompt, paths = prompt_of(command), image_paths(command.images)
    from groundingdino.inference.predictor import DetectionFilter, load_model
    from groundingdino.inference.results import to_json
    from groundingdino.inference.visualize import comfortable_factor, draw_detections
    from groundingdino.runtime import devices

    limits = DetectionFilter(command.threshold, command.top_k, command.nms, not command.nms_across_labels)
    checkpoint = find_checkpoint(command.checkpoint)
    devices.configure(devices.pick_device(command.device))
    predictor = load_model(checkpoint, command.device, command.precision, command.scale)
    pictures = _picture_paths(command.save, paths)
    lines = open(command.json, "w", encoding="utf-8") if command.json else sys.stdout
    bar = tqdm(total=len(paths), unit="image", disable=len(paths) < 2 or not sys.stderr.isatty())
    unreadable = 0
    try:
        for path, image, found in _answers(predictor, paths, prompt, limits, command.batch_size):
            bar.update()
            if isinstance(found, ValueError):
                unreadable += 1
                bar.write(f"skipped: {found}", file=sys.stderr)
                continue
            _write_line(lines, {"image": str(path), "detections": to_json(found)})
            if command.save is not None and image is not None:
                draw_detections(image, found, enlarge=comfortable_factor(image.size)).save(pictures[path])
    finally:
        bar.close()
        if command.json:
            lines.close()
    return 1 if unreadable else 0


def _write_line(lines: IO[str], row: dict[str, Any]) -> None:
    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    lines.flush()


def _picture_paths(save: Path | None, paths: list[Path]) -> dict[Path, Path]:
    """Where each image's picture goes: to `save` itself, or into that folder under the image's name."""
    if save is None:
        return {}
    if len(paths) == 1 and save.suffix and not save.is_dir():
        return {paths[0]: save}
    save.mkdir(parents=True, exist_ok=True)
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


def describe(path: Path) -> dict[str, Any]:
    """Size, provenance and config of a checkpoint, from its header alone."""
    import math

    from groundingdino.checkpoints.model_file import CONFIG_KEY, SOURCE_KEY, VERSION_KEY, VOCABULARY_KEY, read_metadata
    from groundingdino.checkpoints.safetensors_file import TensorFile

    metadata = read_metadata(path)
    with TensorFile(path) as file:
        parameters = sum(math.prod(entry.shape) for entry in file.entries.values())
    known = {CONFIG_KEY, SOURCE_KEY, VERSION_KEY, VOCABULARY_KEY}
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "parameters": parameters,
        "format version": metadata.get(VERSION_KEY),
        "provenance": json.loads(metadata.get(SOURCE_KEY, "null")),
        "vocabulary": metadata.get(VOCABULARY_KEY),
        "config": json.loads(metadata[CONFIG_KEY]),
        **{key: value for key, value in metadata.items() if key not in known},
    }


def run_info(command: Info) -> int:
    """Print what `describe` says."""
    facts = describe(command.checkpoint)
    if command.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    facts["bytes"] = f"{facts['bytes']:,} ({facts['bytes'] / 2**20:.1f} MiB)"
    facts["parameters"] = f"{facts['parameters']:,} ({facts['parameters'] / 1e6:.1f} M)"
    facts["provenance"] = facts["provenance"] or "not recorded"
    print("\n".join(_lines(facts)))
    return 0


def _lines(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in facts.items():
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {value}"


def run_demo(command: Demo) -> int:
    """Serve until interrupted."""
    from groundingdino.cli.demo import build_page
    from groundingdino.inference.predictor import load_model
    from groundingdino.runtime import devices

    devices.configure(devices.pick_device(command.device))
    predictor = load_model(find_checkpoint(command.checkpoint), command.device, command.precision)
    page = build_page(predictor, command.samples)
    page.launch(server_name=command.host, server_port=command.port)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Parse and run one command. The exit code."""
    command = tyro.cli(
        Annotated[Predict, tyro.conf.subcommand("predict")]
        | Annotated[Info, tyro.conf.subcommand("info")]
        | Annotated[Demo, tyro.conf.subcommand("demo")],
        args=arguments,
        prog="python -m groundingdino",
        description=__doc__,
    )  # type: ignore[call-overload]
    try:
        if isinstance(command, Predict):
            return run_predict(command)
        return run_info(command) if isinstance(command, Info) else run_demo(command)
    except BrokenPipeError:  # whoever read our output has seen enough, e.g. `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"groundingdino: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
