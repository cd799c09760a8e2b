"""The records that cross stage borders. Frozen; tensors only move between devices, nothing is edited in place.

Axes: B images, H/W pixels, T text tokens, S image tokens, Q queries, N objects (padded to the most in the batch).
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from groundingdino.runtime import devices

Record = TypeVar("Record")


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return devices.send(value, device)
    if is_dataclass(value) and not isinstance(value, type):
        return to_device(value, device)
    return value


def to_device(record: Record, device: torch.device | str) -> Record:
    """A copy of a record with every tensor in it (records inside records too) on `device`; see `devices.send`."""
    moved = {f.name: _move(getattr(record, f.name), torch.device(device)) for f in fields(record)}  # type: ignore[arg-type]
    return replace(record, **moved)  # type: ignore[type-var]


@dataclass(frozen=True)
class ImageBatch:
    """Normalised RGB images, padded with 0 on the right and bottom to the largest of the batch."""

    pixels: Tensor  # (B, 3, H, W) float
    valid: Tensor  # (B, H, W) bool, True = real
    padded: bool  # whether some image is smaller than the batch; known to the host, to leave out masks that say nothing


@dataclass(frozen=True)
class TextBatch:
    """Tokenised captions, padded on the right to the longest of the batch. See `text.collate_text`."""

    token_ids: Tensor  # (B, T) int64
    position_ids: Tensor  # (B, T) int64, restarting in each sub-sentence
    attends: Tensor  # (B, T, T) bool, True = query token (row) may look at key token (column)
    valid: Tensor  # (B, T) bool, True = real


@dataclass(frozen=True)
class Targets:
    """Objects of a batch, padded on the right to N = the most in one image (at least 1: shapes never vanish)."""

    boxes: Tensor  # (B, N, 4) cxcywh in [0, 1] of the unpadded image
    positive_map: Tensor  # (B, N, T) bool, True where a token names the object
    labels: (
        Tensor  # (B, N) int64, row of the denoising label embedding: index of the class in the prompt or of the phrase
    )
    valid: Tensor  # (B, N) bool, True = real
    counts: tuple[int, ...]  # objects of each image, on the host


@dataclass(frozen=True)
class Prediction:
    """One decoder layer's outputs."""

    logits: Tensor  # (B, Q, T) query-token alignment before the sigmoid; -inf at text padding
    boxes: Tensor  # (B, Q, 4) cxcywh in [0, 1] of the unpadded image


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first."""

    boxes: Tensor  # (K, 4) xyxy in pixels of the original image
    scores: Tensor  # (K,) in [0, 1]
    labels: Tensor  # (K,) int64, index into the prompt's categories, spans or phrases; 0 in referring mode
    names: tuple[str, ...]  # one per detection
    spans: tuple[tuple[tuple[int, int], ...], ...] | None = (
        None  # per detection, characters [start, end) of the caption
    )
