"""Training samples: an annotation entry, its image, an augmentation and a prompt, all decided by (seed, draw)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from groundingdino.data import captions
from groundingdino.data.annotations import Annotations, Entry, OnBadSample
from groundingdino.data.augmentation import Augmentation, Augmented, augment
from groundingdino.data.batch import Sample, SampleInfo
from groundingdino.data.sampler import Draw
from groundingdino.inputs import text
from groundingdino.inputs.images import open_image, to_tensor

MAX_SKIPS = 100  # bad samples in a row before "skip" gives up: then it is not the samples that are bad


class BadSampleError(ValueError):
    """A sample cannot be used. The message names file and line."""


@dataclass(frozen=True)
class TrainingSource:
    """An annotation file with the folder of its images."""

    annotations: Annotations
    images: Path
    name: str = "refcoco"
    weight: float = 1.0  # how many times an epoch shows each entry; see BatchPlan
    repeat_threshold: float = 0.0  # of detection data: see `repeats`

    def repeats(self) -> np.ndarray | None:
        """How many times each entry is shown, (n,) int64, so that rare categories are seen; None for each once.

        The largest sqrt(threshold / share of the images with the category) over the categories of an image, at least
        1 and rounded up: LVIS' repeat factors (Gupta et al. 2019) as in mmdet's `ClassBalancedDataset`.
        """
        if self.repeat_threshold <= 0 or self.annotations.label_map is None:
            return None
        of_entry = [self._categories(index) for index in range(len(self.annotations))]
        labels, counts = np.unique(np.concatenate([*of_entry, np.zeros(0, np.int64)]), return_counts=True)
        factors = np.sqrt(self.repeat_threshold * len(of_entry) / counts)
        factor = dict(zip(labels.tolist(), factors.tolist(), strict=True))
        return np.array([math.ceil(max([1.0, *(factor[n] for n in own.tolist())])) for own in of_entry], np.int64)

    def _categories(self, index: int) -> np.ndarray:
        try:
            return np.unique(self.annotations.entry(index).labels)
        except ValueError:  # loading the sample will say so
            return np.zeros(0, np.int64)


@dataclass(frozen=True)
class SampleLimits:
    """What a sample may hold; the model's sizes."""

    max_tokens: int = text.MAX_TOKENS
    max_objects: int = 900  # queries; of more objects a random part is kept
    num_labels: int = 256  # rows of the denoising label embedding


@dataclass(frozen=True)
class _Named:
    """The caption of a sample and what it calls each object."""

    caption: str
    labels: Tensor  # (N,) int64
    spans: tuple[text.Spans, ...]


class GroundingDataset(Dataset[Sample]):
    """Training samples of all sources, indexed by `Draw` (which a `BatchPlan` yields).

    A sample is a pure function of the seed and its draw: neither the number of workers nor what was loaded before
    matters. With `on_bad_sample` "skip" a bad sample is replaced by the next good one, and noted in `problems`.

    Args:
        sources: see `TrainingSource`.
        augmentation: of the images; also decides whether captions are mirrored.
        seed: of everything random about a sample.
        on_bad_sample: "stop" raises BadSampleError, naming file and line, for a missing or unreadable image, an image
            of another size than annotated, a box outside its image or without area, and an entry without a phrase.
    """

    def __init__(
        self,
        sources: Sequence[TrainingSource],
        augmentation: Augmentation | None = None,
        seed: int = 0,
        on_bad_sample: OnBadSample = "stop",
        limits: SampleLimits | None = None,
    ):
        if not sources:
            raise ValueError("no training data: give at least one source")
        self.sources = tuple(sources)
        self.augmentation = augmentation or Augmentation()
        self.seed, self.on_bad_sample, self.limits = seed, on_bad_sample, limits or SampleLimits()
        self._first = np.cumsum([0, *(len(source.annotations) for source in sources)])
        self._tokenizer = text.CaptionTokenizer()

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, draw: Draw) -> Sample:
        problems: list[str] = []
        for skipped in range(min(MAX_SKIPS, len(self))):
            index = (draw.index + skipped) % len(self)
            try:
                entry, image, found = self._load(index)
            except BadSampleError as error:
                if self.on_bad_sample == "stop":
                    raise BadSampleError(f'{error}; correct it or choose to skip (on_bad_sample "skip")') from error
                problems.append(str(error))
                continue
            problems += found
            generator = np.random.default_rng((self.seed, draw.epoch, draw.copy, index))
            return self._sample(index, entry, image, generator, problems)
        raise BadSampleError(f"{len(problems)} bad samples in a row, the last one: {problems[-1]}")

    def _locate(self, index: int) -> tuple[TrainingSource, int]:
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self.sources[number], index - int(self._first[number])

    def _load(self, index: int) -> tuple[Entry, Tensor, list[str]]:
        """The entry, its (3, h, w) image, and what was left out of it."""
        source, local = self._locate(index)
        where = source.annotations.where(local)
        try:
            entry = source.annotations.entry(local)
        except ValueError as error:
            raise BadSampleError(str(error)) from error
        if entry.problems and self.on_bad_sample == "stop":
            raise BadSampleError(entry.problems[0])
        try:
            image = open_image(source.images / entry.file_name)
        except ValueError as error:
            raise BadSampleError(f"{where}: {error}") from error
        if image.size != (entry.width, entry.height):
            annotated, found = f"{entry.width}x{entry.height}", f"{image.width}x{image.height}"
            raise BadSampleError(
                f"{where}: {source.images / entry.file_name} is {found}, annotated for {annotated}: boxes would be off"
            )
        return entry, to_tensor(image), list(entry.problems)

    def _sample(
        self, index: int, entry: Entry, image: Tensor, generator: np.random.Generator, problems: list[str]
    ) -> Sample:
        source, local = self._locate(index)
        boxes = torch.from_numpy(entry.boxes).float()
        view = augment(image, boxes, self.augmentation, generator)
        labels = torch.from_numpy(entry.labels)[view.kept]
        if entry.caption is None:
            named, kept = self._name_categories(labels, source, generator)
        else:
            named, kept = _name_phrases(entry, labels, view)
        encoded = self._tokenizer.encode(named.caption)
        kept, notes = self._within_limits(named, kept, encoded, generator)
        where = source.annotations.where(local)
        info = SampleInfo(
            image_path=source.images / entry.file_name,
            caption=named.caption,
            size=(view.image.shape[1], view.image.shape[2]),
            original_size=(entry.height, entry.width),
            scale_factor=view.scale_factor,
            sample_id=local,
            dataset_name=source.name,
            line=int(source.annotations.lines[local]),
        )
        return Sample(
            view.image,
            encoded,
            info,
            view.boxes[kept],
            named.labels[kept],
            tuple(named.spans[n] for n in kept.tolist()),
            (*problems, *(f"{where}: {note}" for note in notes)),
        )

    def _name_categories(
        self, labels: Tensor, source: TrainingSource, generator: np.random.Generator
    ) -> tuple[_Named, Tensor]:
        label_map = source.annotations.label_map
        assert label_map is not None
        draw = captions.draw_categories(labels.tolist(), label_map, self._tokenizer, generator, self.limits.max_tokens)
        places = torch.tensor([draw.places.get(label, -1) for label in labels.tolist()], dtype=torch.int64)
        named = _Named(draw.caption, places, tuple(draw.spans[place] if place >= 0 else () for place in places))
        return named, (places >= 0).nonzero()[:, 0]

    def _within_limits(
        self, named: _Named, kept: Tensor, encoded: text.EncodedCaption, generator: np.random.Generator
    ) -> tuple[Tensor, list[str]]:
        """Which objects stay: those that a token of the truncated caption names, at most `max_objects` of them.

        An object without a token would teach its box that no word fits; mmdet lets it.
        """
        notes = []
        # The last place of a truncated caption is [SEP].
        words = self.limits.max_tokens - 1 if len(encoded.token_ids) > self.limits.max_tokens else None
        token_sets = text.tokens_of_spans(encoded, named.spans)
        can_be_named = torch.tensor(
            [any(words is None or token < words for token in tokens) for tokens in token_sets], dtype=torch.bool
        )
        usable = can_be_named[kept] & (named.labels[kept] < self.limits.num_labels)
        if not usable.all():
            notes.append(
                f"{int((~usable).sum())} objects left out, no token names them "
                f"({len(encoded.token_ids)} tokens, {self.limits.max_tokens} are read)"
            )
            kept = kept[usable]
        if len(kept) > self.limits.max_objects:
            notes.append(f"{len(kept)} objects, {self.limits.max_objects} of them kept at random")
            chosen = generator.choice(len(kept), self.limits.max_objects, replace=False)
            kept = kept[torch.from_numpy(np.sort(chosen))]
        return kept, notes


def _name_phrases(entry: Entry, labels: Tensor, view: Augmented) -> tuple[_Named, Tensor]:
    assert entry.caption is not None
    caption, region_spans = entry.caption, entry.spans
    if view.flipped:
        caption, region_spans = captions.swap_sides(caption, region_spans)
    caption, region_spans = captions.grounding_caption(caption, region_spans)
    spans = tuple(region_spans[label] for label in labels.tolist())
    return _Named(caption, labels, spans), torch.arange(len(labels))
