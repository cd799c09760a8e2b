"""Opening what a protocol reads: its annotation file and its folder of images, each missing one named in one line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groundingdino.data.formats import files


def read_document(path: Path, *lists: str) -> dict[str, Any]:
    """A JSON object that holds the named lists.

    Raises:
        ValueError: naming the file, if it is missing, no JSON, or lacks one of them.
    """
    document = files.read_json(path, dict)
    missing = [name for name in lists if not isinstance(document.get(name), list)]
    if missing:
        raise ValueError(f"{path}: expected an object with lists {', '.join(lists)}; {', '.join(missing)} missing")
    return document


def image_path(folder: Path, image: Mapping[str, Any], path: Path) -> Path:
    """Where an `images` entry's file is. ValueError if its name leaves the folder."""
    name = image.get("file_name")
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{path}: image {image.get('id')}: file name {name!r} is not below the image folder")
    return folder / name
