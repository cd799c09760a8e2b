"""Large images in overlapping tiles: sliced, ranked tile by tile, shifted back and merged.

An image that fits into one tile is ranked as if there were no tiles.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from groundingdino import boxes as box_ops
from groundingdino.inference import postprocess
from groundingdino.inference.engine import EncodedPrompt, Engine, RankedBoxes
from groundingdino.inputs.images import ResizedImage, Size, resize_for_inference

SAME_OBJECT = 0.5  # IoU over which boxes of one label in two tiles are one object


@dataclass(frozen=True)
class Tiles:
    """How an image is sliced, and how the tiles' boxes are merged."""

    side: int  # pixels
    overlap: float = 0.2  # of the side, at least
    merge: Literal["nms", "fusion"] = "nms"  # the best box of an object, or the mean of its boxes weighted by score

    def __post_init__(self) -> None:
        if self.side < 32:
            raise ValueError(f"tiles of {self.side} pixels: at least 32")
        if not 0 <= self.overlap <= 0.9:
            raise ValueError(f"overlap {self.overlap} is a part of a tile's side, from 0 to 0.9")
        if self.merge not in ("nms", "fusion"):
            raise ValueError(f"merge {self.merge!r}: use nms or fusion")


@dataclass(frozen=True)
class Slice:
    """One tile of an image, as the model takes it."""

    image: ResizedImage
    left: int  # pixels of the original image
    top: int


def slice_image(image: Image.Image, tiles: Tiles | None, scale: Size) -> list[Slice]:
    """The tiles of an upright RGB image, each resized into `scale`; the image itself where it needs no tiles."""
    if tiles is None or max(image.size) <= tiles.side:
        return [Slice(resize_for_inference(image, scale), 0, 0)]
    width, height = min(tiles.side, image.width), min(tiles.side, image.height)
    return [
        Slice(resize_for_inference(image.crop((left, top, left + width, top + height)), scale), left, top)
        for top in starts(image.height, tiles)
        for left in starts(image.width, tiles)
    ]


def starts(length: int, tiles: Tiles) -> list[int]:
    """Where tiles begin along one side: as few as overlap by at least `tiles.overlap`, evenly spread."""
    if length <= tiles.side:
        return [0]
    stride = max(1.0, tiles.side * (1 - tiles.overlap))
    count = -(-(length - tiles.side) // stride)
    return [round(index * (length - tiles.side) / count) for index in range(int(count) + 1)]


def rank_slices(
    engine: Engine, images: Sequence[Sequence[Slice]], prompt: EncodedPrompt, keep: int, tiles: Tiles | None
) -> Iterator[RankedBoxes]:
    """One ranking for each image, which is given as its slices.

    Images of one slice run as one batch, the slices of others as many at once as suits the device.
    """
    if images and all(len(slices) == 1 for slices in images):
        yield from _ranked(engine, [slices[0] for slices in images], prompt, keep)
        return
    for slices in images:
        starts_of_batches = range(0, len(slices), engine.pairs_per_pass)
        batches = (slices[start : start + engine.pairs_per_pass] for start in starts_of_batches)
        parts = [part for batch in batches for part in _ranked(engine, batch, prompt, keep)]
        yield parts[0] if tiles is None or len(parts) == 1 else merge_tiles(parts, tiles)


def _ranked(engine: Engine, slices: Sequence[Slice], prompt: EncodedPrompt, keep: int) -> Iterator[RankedBoxes]:
    """Of slices that run together, in pixels of their images."""
    encoded = engine.encode_images([one.image for one in slices])
    for one, ranked in zip(slices, engine.rank([(image, prompt) for image in encoded], keep), strict=True):
        yield _shifted(ranked, one)


def _shifted(ranked: RankedBoxes, one: Slice) -> RankedBoxes:
    offset = ranked.boxes.new_tensor([one.left, one.top, one.left, one.top])
    return RankedBoxes(ranked.boxes + offset, ranked.scores, ranked.labels)


def merge_tiles(parts: Sequence[RankedBoxes], tiles: Tiles) -> RankedBoxes:
    """The boxes of several tiles, in pixels of the whole image, as one ranking without what was found twice."""
    boxes = torch.cat([part.boxes for part in parts])
    scores = torch.cat([part.scores for part in parts])
    labels = torch.cat([part.labels for part in parts])
    rows = postprocess.suppress(boxes, scores, labels, SAME_OBJECT)
    merged = boxes[rows] if tiles.merge == "nms" else _fused(rows, boxes, scores, labels)
    return RankedBoxes(merged, scores[rows], labels[rows])


def _fused(rows: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """(M, 4): for each of the M best boxes the mean of those of its object, weighted by score."""
    same = box_ops.iou(boxes[rows][:, None], boxes[None]) > SAME_OBJECT
    weights = (same & (labels[rows][:, None] == labels[None])) * scores  # (M, K)
    weights[torch.arange(len(rows)), rows] = scores[rows].clamp(min=torch.finfo(scores.dtype).tiny)
    return weights @ boxes / weights.sum(dim=1, keepdim=True)
