"""The forms in which people hold images -> upright RGB Pillow images."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from groundingdino.inputs.transforms import open_image, to_rgb

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})

ImageLike = str | Path | Image.Image | np.ndarray | torch.Tensor


def image_files(folder: str | Path) -> list[Path]:
    """The image files of a folder (not of its subfolders) by name. ValueError if there is none."""
    files = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"{folder}: no image in this folder (looked for {', '.join(sorted(SUFFIXES))})")
    return files


def load_image(image: ImageLike) -> Image.Image:
    """Any form of one image as an upright RGB Pillow image.

    Args:
        image: a file's path; a Pillow image (its EXIF orientation is applied); an (H, W, 3) RGB, (H, W, 4) RGBA or
            (H, W) gray uint8 array; a (3, H, W) tensor, uint8 or float in [0, 1].
    Raises:
        ValueError: what was given instead, and what to give.
    """
    if isinstance(image, str) and image.split("://")[0] in ("http", "https"):
        raise ValueError(f"{image}: addresses are not fetched; download the file and pass its path")
    if isinstance(image, str | Path):
        return open_image(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, torch.Tensor):
        return _from_tensor(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise ValueError(f"an image is a path, a Pillow image, an array or a tensor, got {type(image).__name__}")


def _from_tensor(image: torch.Tensor) -> Image.Image:
    if image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"an image tensor is (3, H, W) RGB, got {tuple(image.shape)}")
    if image.is_floating_point():
        low, high = image.min().item(), image.max().item()
        if not (0 <= low and high <= 1):
            raise ValueError(f"a float image is in [0, 1], got [{low:g}, {high:g}]; do not normalise it before")
        image = (image.float() * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"an image tensor is uint8 or float in [0, 1], got {image.dtype}")
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def _from_array(image: np.ndarray) -> Image.Image:
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.ndim not in (2, 3) or channels not in (1, 3, 4) or image.size == 0:
        raise ValueError(f"an image array is (H, W, 3) RGB, got {image.shape}")
    if image.dtype != np.uint8:
        raise ValueError(f"an image array is uint8 in 0..255, got {image.dtype}")
    image = image[:, :, 0] if image.ndim == 3 and channels == 1 else image
    return to_rgb(Image.fromarray(np.ascontiguousarray(image)))


def is_one_image(images: Any) -> bool:
    """Whether this is a single image rather than a folder, a list, or a batch in one array or tensor."""
    if isinstance(images, str | Path):
        return not Path(images).is_dir()
    if isinstance(images, np.ndarray | torch.Tensor):
        return images.ndim < 4
    return not isinstance(images, Iterable) or isinstance(images, Image.Image)


def each_image(images: Any) -> Iterator[Any]:
    """One image, a folder, a batch in one array or tensor, or an iterable of these -> the images, one by one."""
    if is_one_image(images):
        yield images
    elif isinstance(images, str | Path):
        yield from image_files(images)
    else:
        for image in images:
            yield from each_image(image)
