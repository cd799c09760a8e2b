"""YOLO: a txt file per image with "class x y width height" in [0, 1]; names and splits in data.yaml or obj.data."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundingdino.data.formats import files
from groundingdino.data.formats.record import (
    MOST_NAME,
    AnnotatedImage,
    AnnotatedObject,
    Box,
    Kind,
    Problem,
    Reading,
    ReadOptions,
    checked,
)
from groundingdino.inputs.images import SUFFIXES

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
NAME_FILES = ("obj.names", "classes.txt", "classes.names", "data.names", "predefined_classes.txt")


@dataclass(frozen=True)
class _Pair:
    """An image and its label file; either may be missing."""

    image: Path | None
    labels: Path
    name: str  # of the image, below the image folder


def read(path: Path, options: ReadOptions) -> Reading:
    """A data set in one of YOLO's layouts: data.yaml (ultralytics, Roboflow), obj.data (Darknet), or a folder of txt
    files beside their images, or in `labels` beside `images`. Sizes come from the images.

    Raises:
        ValueError: naming the folder or file, if there are no label files, or names are missing.
    """
    root = path if path.is_dir() else path.parent
    config = _config(path)
    names = _names(root, config)
    folder = files.ImageFolder(options.images or root)
    pairs = _pairs(root, config, options.split, folder)
    if not pairs:
        raise ValueError(f"{path}: no label file (.txt) was found for it")

    def entries() -> Iterator[AnnotatedImage]:
        for number, pair in enumerate(pairs, start=1):
            yield checked(_convert(pair, names, number), options.allow_outside)

    return Reading(path, "yolo", entries, folder.root, names)


def splits(path: Path) -> list[str]:
    """The splits that the data set names."""
    root = path if path.is_dir() else path.parent
    config = _config(path)
    if any(config.get(key) for keys in SPLITS.values() for key in keys):
        return [split for split, keys in SPLITS.items() if any(config.get(key) for key in keys)]
    return [split for split, keys in SPLITS.items() if _split_folder(root, keys) is not None]


def _config_file(path: Path) -> Path | None:
    if path.is_file():
        return path
    found = [*sorted(path.glob("*.yaml")), *sorted(path.glob("*.yml")), *sorted(path.glob("*.data"))]
    return next((file for file in found if b"names" in files.Sample(file).head), None)


def _config(path: Path) -> dict[str, Any]:
    """What data.yaml or obj.data says; empty where there is none. ValueError if it cannot be read."""
    file = _config_file(path)
    if file is None or file.suffix == ".txt":
        return {}
    if file.suffix == ".data":
        pairs = [line.partition("=") for line in files.read_text(file).splitlines() if "=" in line]
        return {key.strip(): value.strip() for key, _, value in pairs}
    config = files.read_yaml(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected YAML with train, val and names")
    return config


def _names(root: Path, config: Mapping[str, Any]) -> dict[int, str]:
    given = config.get("names")
    if isinstance(given, list | dict):
        numbered = dict(enumerate(given)) if isinstance(given, list) else given
        if not all(type(number) is int and isinstance(name, str | int | float) for number, name in numbered.items()):
            raise ValueError(f"{root}: names of data.yaml are neither a list of names nor numbered ones")
        return {number: str(name) for number, name in numbered.items()}
    files_of_names = [Path(given).name] if isinstance(given, str) else []
    for name in (*files_of_names, *NAME_FILES):
        if os.path.isfile(root / name):  # False for a name that is too long, too
            lines = [line.strip() for line in files.read_text(root / name).splitlines()]
            return dict(enumerate(line for line in lines if line))
    raise ValueError(f"{root}: no category names; add data.yaml with names, or classes.txt with one a line")


def _split_folder(root: Path, keys: tuple[str, ...]) -> Path | None:
    """Where the label files of a split lie if nothing says so."""
    candidates = [folder for key in keys for folder in (root / "labels" / key, root / key / "labels")]
    return next((folder for folder in candidates if folder.is_dir()), None)


def _pairs(root: Path, config: Mapping[str, Any], split: str | None, folder: files.ImageFolder) -> list[_Pair]:
    wanted = SPLITS if split is None else {split: SPLITS[split]}
    listed = [config[key] for keys in wanted.values() for key in keys if config.get(key)]
    places = [place for entry in listed for place in (entry if isinstance(entry, list) else [entry])]
    base = root / (config.get("path") or ".") if isinstance(config.get("path", "."), str) else root
    found: list[_Pair] = []
    for place in places:
        if not isinstance(place, str) or "\0" in place or len(place) > MOST_NAME:
            raise ValueError(f"{root}: train, val and test of data.yaml name folders or lists of images")
        found += _of_place(place, base if base.is_dir() else root, root, folder)
    if listed:
        return found
    places = [place for keys in wanted.values() if (place := _split_folder(root, keys)) is not None]
    places = places or ([root / "labels"] if (root / "labels").is_dir() else [root])
    for place in places:
        texts = sorted(text for text in place.rglob("*.txt") if text.name not in NAME_FILES)
        found += [_pair_of_labels(text, folder) for text in texts]
    return found


def _of_place(place: str, base: Path, root: Path, folder: files.ImageFolder) -> list[_Pair]:
    """The pairs of a `train:` entry: a folder of images, or a text file that lists them."""
    # Roboflow writes ../train/images where train lies beside data.yaml; Darknet writes data/train.txt.
    tails = [place, place.removeprefix("../"), place.partition("/")[2], Path(place).name]
    target = next((b / tail for tail in tails for b in (base, root) if tail and (b / tail).exists()), None)
    if target is None:
        return []
    if target.is_dir():
        images = sorted(file for file in target.rglob("*") if file.suffix.lower() in SUFFIXES)
        if images:
            return [_Pair(image, _labels_of(image), _below(image, folder.root)) for image in images]
        return [_pair_of_labels(text, folder) for text in sorted(_labels_of(target / "x").parent.rglob("*.txt"))]
    lines = [line.strip() for line in files.read_text(target).splitlines() if line.strip()]
    return [_pair_of_line(line, base, root, folder) for line in lines]


def _pair_of_line(line: str, base: Path, root: Path, folder: files.ImageFolder) -> _Pair:
    tails = [line.removeprefix("./"), line.partition("/")[2], Path(line).name]
    candidates = [b / tail for tail in tails for b in (base, root) if tail]
    image = next((file for file in candidates if files.is_file(file)), None) or folder.find(Path(line).name)
    labels = next((text for file in candidates if files.is_file(text := _labels_of(file))), _labels_of(candidates[0]))
    return _Pair(image, labels, _below(image, folder.root) if image else Path(line).name)


def _labels_of(image: Path) -> Path:
    """ultralytics' rule: the last `images` folder of the path becomes `labels`."""
    parts = list(image.with_suffix(".txt").parts)
    places = [n for n, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
        if files.is_file(swapped := Path(*parts)) or not files.is_file(image.with_suffix(".txt")):
            return swapped
    return image.with_suffix(".txt")


def _pair_of_labels(text: Path, folder: files.ImageFolder) -> _Pair:
    parts = list(text.parent.parts)
    if "labels" in parts:
        parts[len(parts) - 1 - parts[::-1].index("labels")] = "images"
    for place in (Path(*parts), text.parent):
        image = next((file for suffix in sorted(SUFFIXES) if (file := place / (text.stem + suffix)).is_file()), None)
        if image is not None:
            return _Pair(image, text, _below(image, folder.root))
    image = folder.find(text.stem)
    return _Pair(image, text, _below(image, folder.root) if image else text.stem)


def _below(image: Path, root: Path) -> str:
    return str(image.relative_to(root)) if image.is_relative_to(root) else str(image)


def _convert(pair: _Pair, names: Mapping[int, str], number: int) -> AnnotatedImage:
    where = str(pair.labels)
    if pair.image is None or (size := files.size_or_zero(pair.image)) == (0, 0):
        text = f"boxes are relative to {pair.name!r}, whose size is unknown: the image is missing or broken"
        problem = Problem(Kind.MISSING_IMAGE, where, text, fatal=True)
        return AnnotatedImage(where, pair.name, problems=(problem,), number=number)
    objects, problems = [], []
    try:
        lines = files.read_text(pair.labels).splitlines() if files.is_file(pair.labels) else []
    except ValueError as error:
        lines, problems = [], [Problem(Kind.MALFORMED, where, str(error).removeprefix(f"{where}: "))]
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        found = _parse(line, names, size)
        if isinstance(found, tuple):
            label, box = found
            objects.append(AnnotatedObject(box, label, names[label], place))
        else:
            problems.append(found(f"{where}: line {place}"))
    return AnnotatedImage(
        where, pair.name, *size, tuple(objects), problems=tuple(problems), object_unit="line", number=number
    )


class _Fault:
    def __init__(self, kind: Kind, text: str) -> None:
        self.kind, self.text = kind, text

    def __call__(self, where: str) -> Problem:
        return Problem(self.kind, where, self.text)


def _parse(line: str, names: Mapping[int, str], size: tuple[int, int]) -> tuple[int, Box] | _Fault:
    """Class and box of a row; of a polygon's row (segmentation, oriented boxes) the bounding box."""
    fields = line.split()
    try:
        label, values = float(fields[0]), [float(field) for field in fields[1:]]
    except ValueError:
        return _Fault(Kind.MALFORMED, f"expected class x y width height, got {line[:60]!r}")
    if not label.is_integer() or int(label) not in names:
        return _Fault(Kind.UNKNOWN_CATEGORY, f"class {fields[0]:.40} is not among the {len(names)} names")
    width, height = size
    if len(values) == 4:
        x, y, w, h = values
        corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    elif len(values) >= 6 and len(values) % 2 == 0:
        corners = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    else:
        return _Fault(Kind.MALFORMED, f"expected class x y width height, got {len(fields)} fields")
    if max(map(abs, corners)) > 2:
        return _Fault(Kind.NUMBERS, f"{line[:60]!r} is not in [0, 1] of the image; YOLO boxes are relative")
    return int(label), (corners[0] * width, corners[1] * height, corners[2] * width, corners[3] * height)


def sniff(sample: files.Sample) -> bool:
    """Whether it is data.yaml or obj.data with names, or a folder with one, or with label files."""
    if not sample.is_folder:
        return sample.path.suffix in (".yaml", ".yml", ".data") and b"names" in sample.head
    if _config_file(sample.path) is not None:
        return True
    places = [sample.path / "labels", sample.path]
    for keys in SPLITS.values():
        places += [folder for folder in [_split_folder(sample.path, keys)] if folder]
    return any(_is_label_file(text) for place in places for text in [_first_text(place)] if text)


def _first_text(place: Path) -> Path | None:
    texts = (text for text in sorted(place.glob("*.txt")) if text.name not in NAME_FILES and text.stat().st_size)
    return next(texts, None)


def _is_label_file(text: Path) -> bool:
    fields = files.Sample(text).head.split(b"\n")[0].split()
    try:
        return len(fields) >= 5 and all(float(field) is not None for field in fields)
    except ValueError:
        return False


def encode(entry: AnnotatedImage, class_of: Callable[[AnnotatedObject], int]) -> str:
    """An entry as the text of its label file; its size must be known."""
    rows = []
    for thing in entry.objects:
        x1, y1, x2, y2 = thing.box
        values = (
            (x1 + x2) / 2 / entry.width,
            (y1 + y2) / 2 / entry.height,
            (x2 - x1) / entry.width,
            (y2 - y1) / entry.height,
        )
        rows.append(" ".join([str(class_of(thing)), *(f"{value:.10g}" for value in values)]))
    return "".join(row + "\n" for row in rows)


def encode_config(config: Mapping[str, Any]) -> bytes:
    """The text of data.yaml."""
    return files.dump_yaml(dict(config)).encode()
