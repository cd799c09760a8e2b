"""Images: decode, resize, normalise. No OpenCV; what mmdet does with it is done here with Pillow and torch.

An image is a (3, h, w) uint8 RGB tensor until `normalise`. Sizes are (width, height) as in Pillow, in pixels.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

MEAN = (123.675, 116.28, 103.53)  # RGB, of 0..255
STD = (58.395, 57.12, 57.375)
TEST_SCALE = (800, 1333)  # most pixels of the short and of the long side
ALPHA_CANVAS = (124, 117, 104)  # what mmcv puts under a gray image with transparency

Size = tuple[int, int]


def open_image(path: Path | str) -> Image.Image:
    """The decoded RGB image of a file, upright by its EXIF tag.

    Raises:
        ValueError: naming the file, if it is missing or cannot be decoded to the end.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such image file") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright RGB image; mmcv `image/io.py::_pillow2array`. Transparency is dropped, but for gray with alpha."""
    image.load()  # some formats hold their EXIF tag behind the pixels
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode != "LA":
        return image.convert("RGB")
    with_alpha = image.convert("RGBA")
    canvas = Image.new("RGB", with_alpha.size, ALPHA_CANVAS)
    canvas.paste(with_alpha, mask=with_alpha.getchannel("A"))
    return canvas


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> (3, h, w) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _ratio(size: Size, scale: Size) -> float:
    return min(max(scale) / max(size), min(scale) / min(size))


def test_size(size: Size, scale: Size = TEST_SCALE) -> Size:
    """The size that fits into `scale` (short side, long side), truncated: 199x300 at 800 becomes 799x1206.

    mmdet `datasets/transforms/transforms.py::_fixed_scale_size`.
    """
    ratio = _ratio(size, scale)
    return max(int(size[0] * ratio), 1), max(int(size[1] * ratio), 1)


def train_size(size: Size, scale: Size) -> Size:
    """The size that fits into `scale` (short side, long side), rounded; mmcv `image/geometric.py::_scale_size`."""
    ratio = _ratio(size, scale)
    return max(int(size[0] * ratio + 0.5), 1), max(int(size[1] * ratio + 0.5), 1)


# pytest would collect the mmdet-given name as a test where a test module imports it.
test_size.__test__ = False  # type: ignore[attr-defined]


def resize_for_test(image: Image.Image, scale: Size = TEST_SCALE) -> tuple[Tensor, tuple[float, float]]:
    """Pillow's bilinear filter, which averages where it shrinks.

    Returns:
        (3, h, w) uint8, and the factors (width, height) that boxes were multiplied by: they differ by the truncation.
    """
    width, height = test_size(image.size, scale)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return to_tensor(resized), (width / image.width, height / image.height)


def resize_for_training(image: Tensor, size: Size) -> Tensor:
    """(3, h, w) uint8 -> `size`, bilinear without averaging, as cv2.resize does: equal within one gray level.

    The outer corners of both images coincide (align_corners=False).
    """
    if (image.shape[2], image.shape[1]) == size:
        return image
    width, height = size
    return F.interpolate(image[None], size=(height, width), mode="bilinear", align_corners=False)[0]


def normalise(image: Tensor, out: Tensor | None = None) -> Tensor:
    """(3, h, w) uint8 -> float32, (x - MEAN) / STD; into `out`, a view of that shape, where given."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    pixels = torch.empty(image.shape) if out is None else out
    return pixels.copy_(image).sub_(mean).div_(std)
