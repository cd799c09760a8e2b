"""`groundingdino.datasets.transforms` of IDEA-Research/GroundingDINO, for images without targets: as it predicts.

Each takes and gives (image, target); the target, None in every client that we know, is handed through.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision.transforms.functional as F
from PIL import Image
from torch import Tensor

Transform = Callable[[Any, Any], tuple[Any, Any]]


def _size(width: int, height: int, short: int, longest: int | None) -> tuple[int, int]:
    """(height, width) whose short side is `short`, or less where the long one would exceed `longest`."""
    if longest is not None and max(width, height) / min(width, height) * short > longest:
        short = round(longest * min(width, height) / max(width, height))
    if width < height:
        return int(short * height / width), short
    return short, int(short * width / height)


class Compose:
    """One after another."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any, target: Any = None) -> tuple[Any, Any]:
        """The image after all of them, and the target."""
        for transform in self.transforms:
            image, target = transform(image, target)
        return image, target


class RandomResize:
    """Resize to a short side drawn from `sizes`, with a long side of at most `max_size`."""

    def __init__(self, sizes: Sequence[int], max_size: int | None = None) -> None:
        self.sizes, self.max_size = sizes, max_size

    def __call__(self, image: Image.Image, target: Any = None) -> tuple[Image.Image, Any]:
        """The resized image, and the target as it was."""
        _refuse(target)
        return F.resize(image, list(_size(*image.size, random.choice(self.sizes), self.max_size))), None


class ToTensor:
    """A PIL image to (3, H, W) in [0, 1]."""

    def __call__(self, image: Image.Image, target: Any = None) -> tuple[Tensor, Any]:
        """The image as a tensor, and the target."""
        return F.to_tensor(image), target


class Normalize:
    """Subtract a mean and divide by a deviation, for each channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __call__(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        """The normalised image, and the target as it was."""
        _refuse(target)
        return (image - self.mean) / self.std, None


def _refuse(target: Any) -> None:
    if target is not None:
        raise ValueError("boxes are not resized here: augment with groundingdino.data")
