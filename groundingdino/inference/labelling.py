"""Labelling any number of images: every image once through the engine, its raw scores kept, labels chosen from them.

    run = LabelRun.create(folder, asked, lambda: list_images([Path("photos")]))
    label(predictor, run, predictor.encode_prompt(texts_as_names(vocabulary)), LabelOptions())
    choose = Chooser(vocabulary.texts, vocabulary, Choice(threshold=0.35))
    for ref, record in run.results():
        found = choose(record)

What is stored are the boxes of every text of the vocabulary, prompts and negatives, so names, thresholds and
suppression can be chosen again without the model.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from groundingdino.inference import postprocess
from groundingdino.inference.engine import TOP_K_PER_CAPTION, EncodedPrompt, RankedBoxes
from groundingdino.inference.image_source import ImageRef, open_ref
from groundingdino.inference.label_store import WAIT, LabelRun, Record, Shard
from groundingdino.inference.predictor import THRESHOLD, DetectionFilter, Predictor, filter_detections
from groundingdino.inference.prompts import ResolvedPrompt
from groundingdino.inference.tiles import Slice, Tiles, rank_slices, slice_image
from groundingdino.inference.vocabulary import Name, Vocabulary
from groundingdino.inputs.images import Size
from groundingdino.runtime import devices
from groundingdino.runtime.loader_process import batches, end_with_a_lost_batch
from groundingdino.structures import Detections


@dataclass(frozen=True)
class LabelOptions:
    """How images run through the model."""

    batch_size: int | None = None  # images of one size that run together; None: 1 on a CPU, else 8
    workers: int = 2  # processes that decode and resize; 0: this one
    tiles: Tiles | None = None
    keep_above: float = 0.05  # least raw score that is stored

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size}: at least 1")
        if not 0 <= self.keep_above < 1:
            raise ValueError(f"keep_above {self.keep_above} is not in [0, 1)")


@dataclass(frozen=True)
class Choice:
    """Which of the raw boxes become labels: by score, then suppression, size and number."""

    threshold: float = THRESHOLD  # of names without one of their own
    nms: float | None = 0.7  # IoU over which the worse of two boxes of one name goes
    nms_across: float | None = None  # the same between all names
    min_size: float = 1.0  # pixels of the shorter side
    top_k: int | None = None  # of an image

    def __post_init__(self) -> None:
        for iou in (self.nms, self.nms_across):
            DetectionFilter(self.threshold, self.top_k, iou)  # checks them
        if self.min_size < 0:
            raise ValueError(f"min_size {self.min_size}: not negative")


def texts_as_names(vocabulary: Vocabulary) -> Vocabulary:
    """The prompt that asks for each text by itself: its labels are what is stored."""
    return Vocabulary(tuple(Name(text) for text in vocabulary.texts), vocabulary.names_per_caption)


def label(
    predictor: Predictor,
    run: LabelRun,
    prompt: EncodedPrompt,
    options: LabelOptions,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Work on the run until its shards are done, by this process or by others.

    Args:
        prompt: of `texts_as_names`.
        progress: called with the number of images after each batch of this process.
    """
    with run.heartbeat():
        while waiting := [number for number in range(len(run.manifest.offsets)) if not run.is_done(number)]:
            _label_free(predictor, run.claimed(waiting), prompt, options, progress, run.finish)
            if not all(map(run.is_done, waiting)):
                time.sleep(WAIT)  # the rest is others' work, or that of one that has just ended


def _label_free(
    predictor: Predictor,
    shards: Iterator[Shard],
    prompt: EncodedPrompt,
    options: LabelOptions,
    progress: Callable[[int], None],
    finish: Callable[[Shard], None],
) -> None:
    """Label claimed shards. Decoding, the model and writing overlap."""
    first = next(shards, None)
    if first is None:
        return
    with ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for shard, images in _of_shards(itertools.chain([first], shards), predictor, options):
            for records in _found(images, predictor, prompt, options):
                if written is not None:
                    written.result()
                written = writer.submit(_write, shard, records)
                progress(len(records))
            if written is not None:
                written.result()
            finish(shard)


def find(
    predictor: Predictor, images: Iterable[tuple[int, ImageRef]], prompt: EncodedPrompt, options: LabelOptions
) -> Iterator[list[Record]]:
    """The records of images and their positions, batch by batch, without a run. OSError where a store fails."""
    return _found(_decoded(iter(images), predictor, options), predictor, prompt, options)


def _found(
    images: Iterable["_Decoded"], predictor: Predictor, prompt: EncodedPrompt, options: LabelOptions
) -> Iterator[list[Record]]:
    batch_size = options.batch_size or (1 if predictor.device.type == "cpu" else 8)
    for batch in batches_by_shape(images, batch_size):
        readable = [image.slices for image in batch if image.slices]
        ranked = rank_slices(predictor.engine, readable, prompt, TOP_K_PER_CAPTION, options.tiles)
        yield [_record(image, next(ranked) if image.slices else None, options.keep_above) for image in batch]


def _write(shard: Shard, records: Sequence[Record]) -> None:
    for record in records:
        shard.claim.append(record)


@dataclass(frozen=True)
class _Decoded:
    """A decoded image, or why there is none."""

    position: int
    size: Size  # (width, height)
    slices: tuple[Slice, ...]
    problem: str = ""
    stops: bool = False  # the problem is not the image's


def _of_shards(
    shards: Iterable[Shard], predictor: Predictor, options: LabelOptions
) -> Iterator[tuple[Shard, Iterator[_Decoded]]]:
    """Each shard with its images, decoded ahead across the border of shards too."""
    started: deque[Shard] = deque()  # whose images have not been asked for

    def references() -> Iterator[tuple[int, ImageRef]]:
        for shard in shards:
            started.append(shard)
            yield from shard.waiting

    images = _decoded(references(), predictor, options)
    ahead: list[_Decoded] = []  # at most one

    def of_shard(count: int) -> Iterator[_Decoded]:
        for _ in range(count):
            yield ahead.pop() if ahead else next(images)

    while True:
        if not started:
            ahead.extend(itertools.islice(images, 1))  # starts the next shard, and those without images before it
        if not started:
            return
        shard = started.popleft()
        yield shard, of_shard(len(shard.waiting))


def _decoded(
    references: Iterator[tuple[int, ImageRef]], predictor: Predictor, options: LabelOptions
) -> Iterator[_Decoded]:
    """Images in their order, decoded ahead by `options.workers` processes. OSError where a store does not answer."""
    loader = DataLoader(
        _Images(predictor.scale, options.tiles),
        sampler=references,  # type: ignore[arg-type]  # asked for an image when a process is free
        batch_size=None,
        num_workers=options.workers,
        multiprocessing_context=devices.loader_context(predictor.device, options.workers, __name__),
        generator=torch.Generator().manual_seed(0),  # else torch's global generator would be drawn from
        worker_init_fn=end_with_a_lost_batch,
    )
    for image in batches(loader):
        if image.stops:
            raise OSError(image.problem)
        yield image


class _Images(Dataset[_Decoded]):
    """Decoded, sliced and resized images; a message where that fails, as errors cross processes badly."""

    def __init__(self, scale: Size, tiles: Tiles | None) -> None:
        self.scale, self.tiles = scale, tiles

    def __getitem__(self, place: tuple[int, ImageRef]) -> _Decoded:  # type: ignore[override]
        position, ref = place
        try:
            image = open_ref(ref)
        except ValueError as error:
            return _Decoded(position, (0, 0), (), str(error))
        except OSError as error:  # of a store that does not answer: the image is not broken
            return _Decoded(position, (0, 0), (), str(error), stops=True)
        return _Decoded(position, image.size, tuple(slice_image(image, self.tiles, self.scale)))


def batches_by_shape(images: Iterable[_Decoded], batch_size: int) -> Iterator[list[_Decoded]]:
    """Groups of at most `batch_size` images of one size after resizing, so that none is padded; tiled ones alone."""
    waiting: dict[tuple[int, ...], list[_Decoded]] = {}
    for image in images:
        if len(image.slices) != 1:
            yield [image]
            continue
        shape = tuple(image.slices[0].image.pixels.shape)
        waiting.setdefault(shape, []).append(image)
        if len(waiting[shape]) == batch_size:
            yield waiting.pop(shape)
    yield from waiting.values()


def _record(image: _Decoded, ranked: RankedBoxes | None, keep_above: float) -> Record:
    if ranked is None:
        return Record(image.position, problem=image.problem)
    kept = ranked.scores >= keep_above
    columns = (ranked.boxes, "<f4"), (ranked.scores, "<f4"), (ranked.labels, "<i4")
    boxes, scores, labels = (values[kept].numpy().astype(form).tobytes() for values, form in columns)
    return Record(image.position, *image.size, boxes, scores, labels)


def stored_boxes(record: Record) -> RankedBoxes:
    """What was stored of one image; labels index the texts that were asked for."""
    boxes = np.frombuffer(record.boxes, "<f4").reshape(-1, 4)
    labels = np.frombuffer(record.labels, "<i4").astype(np.int64)
    scores = np.frombuffer(record.scores, "<f4").copy()
    return RankedBoxes(torch.from_numpy(boxes.copy()), torch.from_numpy(scores), torch.from_numpy(labels))


class Chooser:
    """Chooses labels among stored boxes.

    Args:
        asked: the texts that were asked for, in the order of the stored labels.
        vocabulary: names made of these texts.
        choice: what to keep.
        keep_above: the least score that was stored.
    Raises:
        ValueError: a text was not asked for, or a threshold is below what was stored.
    """

    def __init__(self, asked: Sequence[str], vocabulary: Vocabulary, choice: Choice, keep_above: float = 0.0) -> None:
        missing = [text for text in vocabulary.texts if text not in set(asked)]
        if missing:
            raise ValueError(f"the run did not ask for {missing[0]!r}: start a new one with another --out")
        least = min([choice.threshold, *(one for one in vocabulary.thresholds if one is not None)])
        if least < keep_above:
            raise ValueError(f"threshold {least} is below {keep_above}, the least score that was stored (--keep-above)")
        place = {text: index for index, text in enumerate(vocabulary.texts)}
        self._text = torch.tensor([place.get(text, -1) for text in asked])
        self._prompt = ResolvedPrompt((), vocabulary.shown, None, False, vocabulary)
        self._filter = DetectionFilter(choice.threshold, None, choice.nms)
        self.vocabulary, self.choice = vocabulary, choice

    def __call__(self, record: Record) -> Detections:
        """The labels of one image, best first; a box at most reaches to the image's edge."""
        stored = stored_boxes(record)
        texts = self._text[stored.labels]
        known = texts >= 0
        folded = RankedBoxes(stored.boxes[known], stored.scores[known], texts[known]).folded(self.vocabulary)
        large = (folded.boxes[:, 2:] - folded.boxes[:, :2]).amin(dim=1) >= self.choice.min_size
        sized = RankedBoxes(folded.boxes[large], folded.scores[large], folded.labels[large])
        found = filter_detections(sized, self._prompt, self._filter)
        rows = torch.arange(len(found.scores))
        if self.choice.nms_across is not None:
            rows = postprocess.suppress(found.boxes, found.scores, None, self.choice.nms_across)
        rows = rows[: self.choice.top_k]
        names = tuple(found.names[row] for row in rows.tolist())
        return replace(
            found, boxes=found.boxes[rows], scores=found.scores[rows], labels=found.labels[rows], names=names
        )
