"""From samples to a batch: what a loader yields.

Axes: B images, H/W pixels, N objects, T text tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundingdino.boxes import xyxy_to_cxcywh
from groundingdino.inputs import text
from groundingdino.inputs.images import collate_images
from groundingdino.structures import ImageBatch, Targets, TextBatch


@dataclass(frozen=True)
class SampleInfo:
    """Where a sample comes from and what was done to it."""

    image_path: Path
    caption: str  # what was tokenised
    size: tuple[int, int]  # (height, width) of the resized image, in pixels
    original_size: tuple[int, int]  # (height, width) of the file, upright
    scale_factor: tuple[float, float]  # (width, height); of the whole, also where a crop lies between
    sample_id: int  # index in its source
    dataset_name: str
    line: int  # of the annotation file, from 1; of a single JSON document, the entry's number from 1


@dataclass(frozen=True)
class Sample:
    """One image with a caption and, in training, the objects that it names."""

    image: Tensor  # (3, h, w) uint8 RGB
    caption: text.EncodedCaption
    info: SampleInfo
    boxes: Tensor | None = None  # (N, 4) xyxy in pixels of `image`; None where there are no targets
    labels: Tensor | None = None  # (N,) int64, see structures.Targets
    spans: tuple[text.Spans, ...] = ()  # per object, characters of the caption
    problems: tuple[str, ...] = ()  # what was skipped on the way, one line each


@dataclass(frozen=True)
class Batch:
    """What a loader yields. `structures.to_device` moves it; pin_memory works on it."""

    images: ImageBatch
    text: TextBatch
    targets: Targets | None
    info: tuple[SampleInfo, ...]
    problems: tuple[str, ...] = ()  # of all samples; the consumer counts and reports them

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory; torch's loader calls this."""
        return _pinned(self)


def _pinned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.pin_memory()
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _pinned(getattr(value, f.name)) for f in fields(value)})
    return value


def collate_targets(samples: Sequence[Sample], num_tokens: int) -> Targets:
    """The objects of all samples, padded to the most in one (at least 1)."""
    counts = tuple(0 if sample.boxes is None else len(sample.boxes) for sample in samples)
    B, N = len(samples), max(1, *counts)
    boxes = torch.zeros(B, N, 4)
    labels = torch.zeros(B, N, dtype=torch.int64)
    named = torch.zeros(B, N, num_tokens, dtype=torch.bool)
    for index, (sample, count) in enumerate(zip(samples, counts, strict=True)):
        if sample.boxes is None or sample.labels is None or count == 0:
            continue
        h, w = sample.image.shape[1:]
        boxes[index, :count] = xyxy_to_cxcywh(sample.boxes) / torch.tensor([w, h, w, h])
        labels[index, :count] = sample.labels
        named[index, :count] = text.positive_map(sample.caption, sample.spans, num_tokens)
    return Targets(boxes, named, labels, torch.arange(N) < torch.tensor(counts)[:, None], counts)


@dataclass(frozen=True)
class Padding:
    """What a batch is padded to beyond its largest sample, so that few different shapes occur."""

    sides: tuple[int, ...] = ()  # pixels, ascending; see `collate_images`
    tokens: int = 1  # the caption length becomes a multiple of it


def padding_for(shapes: int, short_side: tuple[int, int], long_side: int) -> Padding:
    """At most `shapes` (height, width) pairs for batches whose short sides lie between the `short_side`s.

    Half of the sides, or one more, lead up to the largest short side, the others to `long_side`; all are multiples of
    32, the detector's stride. Captions get multiples of 16 tokens. ValueError for fewer than 4 shapes.
    """
    count = math.isqrt(shapes)
    if count < 2:
        raise ValueError(f"data.size_buckets is {shapes}: use at least 4 (two heights by two widths), or 0 for none")
    lower, upper = -(-count // 2), count // 2
    shortest, middle = short_side
    sides = [shortest + (middle - shortest) * step / lower for step in range(1, lower + 1)]
    sides += [middle + (long_side - middle) * step / upper for step in range(1, upper + 1)]
    return Padding(tuple(math.ceil(side / 32) * 32 for side in sides), tokens=16)


def collate(samples: Sequence[Sample], max_tokens: int = text.MAX_TOKENS, padding: Padding | None = None) -> Batch:
    """Samples of any sizes and captions -> one batch. Targets are None if no sample has any (`boxes` is None)."""
    padding = padding or Padding()
    words = text.collate_text([sample.caption for sample in samples], max_tokens, padding.tokens)
    targets = None
    if any(sample.boxes is not None for sample in samples):
        targets = collate_targets(samples, num_tokens=words.token_ids.shape[1])
    return Batch(
        collate_images([sample.image for sample in samples], padding.sides),
        words,
        targets,
        tuple(sample.info for sample in samples),
        tuple(problem for sample in samples for problem in sample.problems),
    )
