"""The random part of training images: mmdet's RefCOCO recipe.

Source: `configs/mm_grounding_dino/refcoco/grounding_dino_swin-t_finetune_8xb4_5e_refcoco.py`. Boxes are xyxy in pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from groundingdino.inputs.images import resize_for_training, training_size

MIN_BOX_SIDE = 1e-2  # pixels of the result; mmdet FilterAnnotations


@dataclass(frozen=True)
class Augmentation:
    """Half of the images are resized; the other half resized, cropped, and resized again."""

    short_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    longest_side: int = 1333
    crop_probability: float = 0.5
    short_sides_before_crop: tuple[int, ...] = (400, 500, 600)
    longest_side_before_crop: int = 4200
    crop_sides: tuple[int, int] = (384, 600)  # height and width are drawn from this range, each within the image
    flip_probability: float = 0.0  # mirrored images get left and right swapped in their caption
    vertical_flip_probability: float = 0.0  # upside down; captions stay as they are


@dataclass(frozen=True)
class Augmented:
    """A training image and what is left of its objects."""

    image: Tensor  # (3, h, w) uint8
    boxes: Tensor  # (K, 4) float32, clipped to the image
    kept: Tensor  # (K,) int64: which of the objects these are
    flipped: bool
    scale_factor: tuple[float, float]  # (width, height) of the resizes together


def augment(image: Tensor, boxes: Tensor, config: Augmentation, generator: np.random.Generator) -> Augmented:
    """(3, h, w) uint8 image and its (N, 4) boxes -> a random view. It may hold no object at all, as in mmdet."""
    kept = torch.arange(len(boxes))
    scale_factor = (1.0, 1.0)
    flipped = bool(generator.random() < config.flip_probability)
    if flipped:
        width = image.shape[2]
        image = image.flip(2)
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
    if config.vertical_flip_probability and generator.random() < config.vertical_flip_probability:
        height = image.shape[1]
        image = image.flip(1)
        boxes = torch.stack([boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]], dim=1)
    if generator.random() < config.crop_probability:
        scale = (_choose(config.short_sides_before_crop, generator), config.longest_side_before_crop)
        image, boxes, scale_factor = _resize(image, boxes, scale)
        image, boxes, inside = _crop(image, boxes, config.crop_sides, generator)
        kept = kept[inside]
    image, boxes, last_factor = _resize(image, boxes, (_choose(config.short_sides, generator), config.longest_side))
    large = (boxes[:, 2:] - boxes[:, :2] > MIN_BOX_SIDE).all(dim=1)
    factor = (scale_factor[0] * last_factor[0], scale_factor[1] * last_factor[1])
    return Augmented(image, boxes[large], kept[large], flipped, factor)


def _choose(options: tuple[int, ...], generator: np.random.Generator) -> int:
    return options[int(generator.integers(len(options)))]


def _clip(boxes: Tensor, width: int, height: int) -> Tensor:
    return torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], dim=2).flatten(1)


def _resize(image: Tensor, boxes: Tensor, scale: tuple[int, int]) -> tuple[Tensor, Tensor, tuple[float, float]]:
    old_width, old_height = image.shape[2], image.shape[1]
    width, height = training_size((old_width, old_height), scale)
    factor = (width / old_width, height / old_height)
    resized = resize_for_training(image, (width, height))
    return resized, _clip(boxes * torch.tensor([*factor, *factor]), width, height), factor


def _crop(
    image: Tensor, boxes: Tensor, sides: tuple[int, int], generator: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A random window; boxes are cut to it, and `inside` tells which of them still lie in it."""
    height, width = image.shape[1:]
    crop_height = int(generator.integers(min(height, sides[0]), min(height, sides[1]) + 1))
    crop_width = int(generator.integers(min(width, sides[0]), min(width, sides[1]) + 1))
    top = int(generator.integers(height - crop_height + 1))
    left = int(generator.integers(width - crop_width + 1))
    window = image[:, top : top + crop_height, left : left + crop_width]
    boxes = _clip(boxes - torch.tensor([left, top, left, top]), crop_width, crop_height)
    inside = (boxes[:, 0] < crop_width) & (boxes[:, 1] < crop_height) & (boxes[:, 2] > 0) & (boxes[:, 3] > 0)
    return window, boxes[inside], inside
