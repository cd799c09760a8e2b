"""Images: read, turn upright, resize, normalize, collate. The one place for all of it, in inference and in training.

What mmdet does with OpenCV is done here with Pillow and torch. An image is an upright RGB Pillow image, then a
(3, h, w) uint8 RGB tensor until `normalize`. Sizes are (width, height) as in Pillow, in pixels, unless said otherwise.
"""

import contextlib
import ctypes
import io
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from groundingdino.runtime.files import open_file
from groundingdino.runtime.messages import brief, printable
from groundingdino.structures import ImageBatch

MEAN = (123.675, 116.28, 103.53)  # RGB, of 0..255
STD = (58.395, 57.12, 57.375)
DEFAULT_SCALE = (800, 1333)  # most pixels of the short and of the long side
ALPHA_CANVAS = (124, 117, 104)  # what mmcv puts under a gray image with transparency

MAX_PIXELS = 2**27  # of one image: as RGBA and RGB below 1 GiB, and more than cameras have
LONGEST_PATH = 4096  # characters
DEEPEST_LIST = 8  # of images within each other
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# EXIF orientation -> what turns the image upright
_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUIET = threading.Lock()  # `warnings.catch_warnings` may not overlap between threads

Size = tuple[int, int]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})

ImageLike = str | Path | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class ImageGeometry:
    """How an image was resized: what it takes to place boxes in the original."""

    size: tuple[int, int]  # (height, width) of the resized image
    scale_factor: tuple[float, float]  # resized / original, (x, y): they differ by the truncation


@dataclass(frozen=True)
class ResizedImage:
    """One image as the model takes it, but for `normalize`."""

    pixels: Tensor  # (3, h, w) uint8 RGB
    geometry: ImageGeometry


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
        return _decoded(image, "the Pillow image")
    if isinstance(image, Tensor):
        return _from_tensor(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise ValueError(f"an image is a path, a Pillow image, an array or a tensor, got {type(image).__name__}")


def _from_tensor(image: Tensor) -> Image.Image:
    if image.is_meta or image.is_nested or image.layout != torch.strided or image.is_quantized:
        raise ValueError("an image tensor is dense and holds its values, got a meta, nested, sparse or quantized one")
    if image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"an image tensor is (3, H, W) RGB, got {tuple(image.shape)}")
    if image.dtype in FLOATS:
        image = image.detach().float()
        low, high = image.min().item(), image.max().item()
        if not (0 <= low and high <= 1):
            raise ValueError(f"a float image is in [0, 1], got [{low:g}, {high:g}]; do not normalize it before")
        image = (image * 255).round().to(torch.uint8)
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
        return not os.path.isdir(images)
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim < 4
    return not isinstance(images, Iterable) or isinstance(images, Image.Image | bytes | bytearray | Mapping)


def each_image(images: Any, depth: int = 0) -> Iterator[Any]:
    """One image, a folder, a batch in one array or tensor, or an iterable of these -> the images, one by one.

    Raises:
        ValueError: for an iterable that contains itself, or is nested too deep.
    """
    if is_one_image(images):
        yield images
    elif depth == DEEPEST_LIST:
        raise ValueError(f"images are nested over {DEEPEST_LIST} deep, or a list contains itself: pass a flat list")
    elif isinstance(images, str | Path):
        yield from image_files(images)
    else:
        for image in images:
            yield from each_image(image, depth + 1)


def open_image(path: Path | str) -> Image.Image:
    """The decoded RGB image of a file, upright by its EXIF tag.

    Raises:
        ValueError: naming the file, if it is missing, no regular file, too large, or cannot be decoded to the end.
    """
    name = str(path)
    if len(name) > LONGEST_PATH:
        raise ValueError(f"a path of {len(name):,} characters is none: {name[:40]!r}...")
    try:
        file = open_file(Path(path))
    except ValueError as error:
        raise ValueError(str(error).replace(name, printable(name))) from error
    with file:
        return _decoded(file, printable(name))


def decode_image(content: bytes, shown: str) -> Image.Image:
    """`open_image` of a file's content, `shown` its name in messages."""
    return _decoded(io.BytesIO(content), printable(shown))


def _decoded(source: BinaryIO | Image.Image, shown: str) -> Image.Image:
    """`to_rgb` of a file or a Pillow image, which may be read from a file only now; ValueError if that fails."""
    _silence_libtiff()
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about what is decoded all the same
        try:
            if isinstance(source, Image.Image):
                return to_rgb(source)
            with Image.open(source, formats=readable_formats()) as image:
                return to_rgb(image)
        except UnidentifiedImageError as error:  # whose text has the file object's address or number
            raise ValueError(f"{shown}: not a readable image (of no known format)") from error
        except Exception as error:  # Pillow's plugins raise whatever their parsing of damaged bytes runs into
            raise ValueError(f"{shown}: not a readable image ({brief(error)})") from error


def readable_formats() -> list[str]:
    """Every format of Pillow but DDS: its decoder goes on for minutes behind the end of a file of 128 bytes."""
    Image.init()
    return [name for name in Image.ID if name != "DDS"]


@cache
def _silence_libtiff() -> None:
    """Keep Pillow's libtiff from printing to stderr by itself, on Linux; its errors come as exceptions as well."""
    with contextlib.suppress(OSError, AttributeError):
        with open("/proc/self/maps") as maps:
            library = next((line.split(maxsplit=5)[5].strip() for line in maps if "/libtiff" in line), None)
        if library is not None:
            for kind in ("Error", "Warning"):
                getattr(ctypes.CDLL(library), f"TIFFSet{kind}Handler")(None)


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright RGB image; mmcv `image/io.py::_pillow2array`. Transparency is dropped, but for gray with alpha.

    16 bits of gray become 8 (mmcv cuts them off at 255, which makes such images white).

    Raises:
        ValueError: for an image without pixels, of more than `MAX_PIXELS`, or of numbers whose range is not known.
    """
    if image.width * image.height == 0:
        raise ValueError(f"{image.width}x{image.height} pixels")
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}: cut it into tiles")
    image.load()  # some formats hold their EXIF tag behind the pixels
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers of unknown range; save it with 8 or 16 bits")
    if image.mode != "LA":
        return image.convert("RGB")
    with_alpha = image.convert("RGBA")
    canvas = Image.new("RGB", with_alpha.size, ALPHA_CANVAS)
    canvas.paste(with_alpha, mask=with_alpha.getchannel("A"))
    return canvas


def _orientation(image: Image.Image) -> object:
    """The EXIF tag; 1, upright, where the EXIF data are damaged."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # as in `_decoded`; the pixels are sound
        return 1


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (3, h, w) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _ratio(size: Size, scale: Size) -> float:
    return min(max(scale) / max(size), min(scale) / min(size))


def inference_size(size: Size, scale: Size = DEFAULT_SCALE) -> Size:
    """The size that fits into `scale` (short side, long side), truncated: 199x300 at 800 becomes 799x1206.

    mmdet `datasets/transforms/transforms.py::_fixed_scale_size`.
    """
    ratio = _ratio(size, scale)
    return max(int(size[0] * ratio), 1), max(int(size[1] * ratio), 1)


def training_size(size: Size, scale: Size) -> Size:
    """The size that fits into `scale` (short side, long side), rounded; mmcv `image/geometric.py::_scale_size`."""
    ratio = _ratio(size, scale)
    return max(int(size[0] * ratio + 0.5), 1), max(int(size[1] * ratio + 0.5), 1)


def resize_for_inference(image: Image.Image, scale: Size = DEFAULT_SCALE) -> ResizedImage:
    """The image resized to `inference_size` by Pillow's bilinear filter, which averages where it shrinks."""
    width, height = inference_size(image.size, scale)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    geometry = ImageGeometry((height, width), (width / image.width, height / image.height))
    return ResizedImage(to_tensor(resized), geometry)


def resize_for_training(image: Tensor, size: Size) -> Tensor:
    """(3, h, w) uint8 -> `size`, bilinear without averaging, as cv2.resize does: equal within one gray level.

    The outer corners of both images coincide (align_corners=False).
    """
    if (image.shape[2], image.shape[1]) == size:
        return image
    width, height = size
    return F.interpolate(image[None], size=(height, width), mode="bilinear", align_corners=False)[0]


def normalize(image: Tensor, out: Tensor | None = None) -> Tensor:
    """(3, h, w) uint8 -> float32, (x - MEAN) / STD; into `out`, a view of that shape, where given."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    pixels = torch.empty(image.shape) if out is None else out
    return pixels.copy_(image).sub_(mean).div_(std)


def collate_images(images: Sequence[Tensor], sides: Sequence[int] = ()) -> ImageBatch:
    """A batch on the CPU of (3, h, w) uint8 images: normalized, then padded with 0 on the right and at the bottom.

    They are padded to the largest of the batch, not to a multiple of anything, as in mmdet. Where there are `sides`, in
    ascending order, height and width become the first that is large enough; a larger image keeps its own.
    """
    sizes = tuple((image.shape[1], image.shape[2]) for image in images)
    largest = (max(lengths) for lengths in zip(*sizes, strict=True))
    height, width = (next((side for side in sides if side >= length), length) for length in largest)
    pixels = torch.zeros(len(images), 3, height, width)
    valid = torch.zeros(len(images), height, width, dtype=torch.bool)
    for index, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
        normalize(image, out=pixels[index, :, :h, :w])
        valid[index, :h, :w] = True
    return ImageBatch(pixels, valid, padded=any(size != (height, width) for size in sizes))
