"""Opening what a protocol reads: its annotation file and its folder of images, each missing one named in one line."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundingdino.data.formats import files


@dataclass(frozen=True)
class ImageFile:
    """An image that annotations are about."""

    path: Path
    size: tuple[int, int] | None = None  # (width, height) as annotated; boxes are off in an image of another size


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


def image_file(folder: Path, image: Mapping[str, Any], path: Path, allow_outside: bool = False) -> ImageFile:
    """The file of an `images` entry. ValueError if its name leaves the folder and may not."""
    name = image.get("file_name")
    outside = isinstance(name, str) and not allow_outside and (Path(name).is_absolute() or ".." in Path(name).parts)
    if not isinstance(name, str) or not name or outside:
        raise ValueError(f"{path}: image {image.get('id')}: file name {name!r} is not below the image folder")
    match image:
        case {"width": int(width), "height": int(height)} if width > 0 and height > 0:
            return ImageFile(folder / name, (width, height))
    return ImageFile(folder / name)
