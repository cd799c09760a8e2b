"""Images and prompts -> `Detections`. The image half and the text half of the model each run once per call.

Axes: B images, T text tokens, D width, C categories, Q queries, K detections.
"""

import logging
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundingdino import checkpoints
from groundingdino.checkpoints.adapter import merge_adapters
from groundingdino.checkpoints.model_file import image_scale, load_detector
from groundingdino.inference import postprocess
from groundingdino.inference.engine import (
    TOP_K_PER_CAPTION,
    EncodedImage,
    EncodedPrompt,
    Engine,
    RankedBoxes,
)
from groundingdino.inference.prompts import (
    Categories,
    Phrases,
    Prompt,
    Referring,
    ResolvedPrompt,
    Scoring,
    Spans,
    resolve,
)
from groundingdino.inference.tiles import Slice, Tiles, rank_slices, slice_image
from groundingdino.inputs.images import DEFAULT_SCALE, each_image, is_one_image, load_image, resize_for_inference
from groundingdino.inputs.text import default_tokenizer
from groundingdino.model.detector import GroundingDINO
from groundingdino.runtime import devices
from groundingdino.structures import Detections

THRESHOLD = 0.3  # default of every mode but referring
PRECISIONS = ("fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DetectionFilter:
    """Which detections are kept: threshold, then NMS, then the best."""

    threshold: float | None = None  # None: 0.3, and 0 for a referring sentence
    top_k: int | None = None  # None: all (mmdet's 300 of each caption), and 1 for a referring sentence
    nms: float | None = None  # IoU over which the worse box goes; None: no suppression, as in mmdet
    nms_per_label: bool = True  # boxes compete within their label only

    def __post_init__(self) -> None:
        _check_number("threshold", self.threshold, Real)
        _check_number("top_k", self.top_k, Integral)
        _check_number("nms", self.nms, Real)
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold} is not in [0, 1]")
        if self.nms is not None and not 0 <= self.nms <= 1:
            raise ValueError(f"nms {self.nms} is an IoU, so in [0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k}: keep at least one detection")


def _check_number(name: str, value: object, kind: type) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
        wanted = "a whole number" if kind is Integral else "a number"
        raise TypeError(f"{name} is {wanted}, got {type(value).__name__}")


def load_model(
    path: str | Path,
    device: str = "auto",
    precision: str = "fp32",
    scale: tuple[int, int] | None = None,
    adapter: str | Path | Sequence[str | Path] = (),
    compile: bool = False,
    allow_nonfinite: bool = False,
) -> "Predictor":
    """A predictor from weights.

    Args:
        path: a checkpoint of ours; IDEA's, mmdet's or transformers' weights; the name of a release such as "mm-gdino-b"
            (`groundingdino models` lists them), or "owner/name" on the Hugging Face hub. See `checkpoints.resolve`.
        device: "auto", "cpu", "cuda", "cuda:1", "npu:0", ...
        precision: see `Predictor`.
        scale: see `Predictor`; default is what the checkpoint was trained for, (800, 1333) where it does not say.
        adapter: file of an adapter that was trained on these weights, or several, whose changes add up. They are merged
            into the weights, so nothing is slower.
        compile: see `Predictor`.
        allow_nonfinite: take weights that are NaN or infinite, too, for instance to look for them.
    Raises:
        ValueError: one line about what is wrong with a file, the device or the precision.
        OSError: the cache of converted and downloaded weights cannot be written.
    """
    checkpoint = checkpoints.resolve(path)
    chosen = devices.pick_device(device)
    devices.prepare_device(chosen)
    adapters = [Path(adapter)] if isinstance(adapter, (str, Path)) else list(map(Path, adapter))
    model = load_detector(checkpoint, "cpu" if adapters else chosen, allow_nonfinite)
    if adapters:
        merge_adapters(model, adapters)
    size = scale or image_scale(checkpoint, DEFAULT_SCALE)
    return Predictor(model, chosen, precision, size, name=str(path), compile=compile)


class Predictor:
    """A detector with everything around it. Not for training: the model is moved, cast and put in eval mode.

    Args:
        model: a `GroundingDINO`.
        device: where to run; default is where the model is.
        precision: "fp32"; "bf16" or "fp16", where the weights are cast, too: half the memory; "bf16-mixed" or
            "fp16-mixed", where they stay float32 and autocast picks the type operator by operator.
        scale: (short side, long side) in pixels that an image is resized to fit into.
        name: what to call the model in messages, such as its checkpoint.
        compile: let torch compile the model's three parts: equal to 1e-4, and for images and prompts of all sizes. The
            first image then takes minutes, a later process's first image seconds (docs/performance.md).
    Raises:
        ValueError: for an unknown precision, and where torch has no compiler for the device.
    """

    def __init__(
        self,
        model: GroundingDINO,
        device: torch.device | None = None,
        precision: str = "fp32",
        scale: tuple[int, int] = DEFAULT_SCALE,
        name: str = "the model",
        compile: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
        self.device = next(model.parameters()).device if device is None else device
        if problem := devices.slow_precision(self.device, precision):
            logger.warning(problem)
        base, _, mixed = precision.partition("-")
        dtype = torch.float32 if mixed else devices.PRECISIONS[base]
        self.model = model.eval().to(self.device, dtype)
        self.scale = scale
        autocast = base if mixed else "fp32"
        self.engine = Engine(self.model, self.device, autocast, name=name, compile=compile)
        self.tokenizer = default_tokenizer()

    def __call__(self, images: Any, prompts: Any = None, **options: Any) -> Detections | list[Detections]:
        """`predict`."""
        return self.predict(images, prompts, **options)

    def predict(
        self,
        images: Any,
        prompts: Prompt | EncodedPrompt | Sequence[Prompt | EncodedPrompt] | None = None,
        *,
        categories: Sequence[str] | str | None = None,
        phrases: str | None = None,
        spans: tuple[str, Sequence[Sequence[Sequence[int]]]] | None = None,
        referring: str | None = None,
        scoring: Scoring = "max",
        threshold: float | None = None,
        top_k: int | None = None,
        nms: float | None = None,
        nms_per_label: bool = True,
        batch_size: int = 1,
        tiles: Tiles | int | None = None,
    ) -> Detections | list[Detections]:
        """Find what one prompt, or one prompt per image, asks for.

        Args:
            images: a path, Pillow image, uint8 RGB array, (3, H, W) tensor or `EncodedImage`; or a folder, a batch,
                or an iterable of these.
            prompts: one prompt for all images, or a list with one for each: `Categories`, `Vocabulary`, `Phrases`,
                `Spans`, `Referring` or `EncodedPrompt`. Instead, one of the next four:
            categories: names, or one string "cat . dog ."; any number, split into several captions as needed.
            phrases: a caption whose noun phrases are looked for.
            spans: (caption, for each object its list of character spans [start, end)).
            referring: a sentence about one object; `scoring` as in `prompts.Referring`.
            threshold: least score; default 0.3, and 0 for `referring`. A vocabulary's own thresholds come first.
            top_k: most detections of an image; default all (300 a caption), and 1 for `referring`.
            nms: IoU over which the worse of two boxes goes; default off. Between equal labels only, unless
                `nms_per_label` is False.
            batch_size: images that run together. Alone (1) an image's result depends on nothing but itself; in a
                batch it is padded to the largest.
            tiles: slice larger images into tiles, by `Tiles` or so many pixels a side; then images run one by one.

        Returns:
            `Detections` on the CPU, best first, for a single image; else a list, in order.
        Raises:
            ValueError: what was wrong with an image, a prompt or an option, and what to do.
        """
        keep = DetectionFilter(threshold, top_k, nms, nms_per_label)
        if prompts is None:
            prompts = _named_prompt(categories, phrases, spans, referring, scoring)
        elif not (categories is phrases is spans is referring is None):
            raise ValueError("give prompts or one of categories, phrases, spans, referring, not both")
        single = is_one_image(images)
        sliced = Tiles(tiles) if isinstance(tiles, int) else tiles
        found = list(self.stream(images, prompts, keep, batch_size, sliced))
        return found[0] if single else found

    def stream(
        self,
        images: Any,
        prompts: Prompt | EncodedPrompt | Sequence[Prompt | EncodedPrompt],
        keep: DetectionFilter | None = None,
        batch_size: int = 1,
        tiles: Tiles | None = None,
    ) -> Iterator[Detections]:
        """`predict` for any number of images, one batch at a time: images are opened when they are needed."""
        keep = keep or DetectionFilter()
        groups: Iterator[list[Any]] = self._groups(images, batch_size) if tiles is None else self._sliced(images, tiles)
        if isinstance(prompts, Prompt | EncodedPrompt):
            (encoded,) = self._encode_prompts([prompts])
            for group in groups:
                yield from self._detect([(image, encoded) for image in group], keep, tiles)
            return
        _check_prompts(prompts)
        used = 0
        for group in groups:
            own = self._encode_prompts(prompts[used : used + len(group)])
            used += len(group)
            if len(own) < len(group):
                raise ValueError(f"{len(prompts)} prompts for more images: give one prompt, or one for each image")
            yield from self._detect(list(zip(group, own, strict=True)), keep, tiles)
        if used != len(prompts):
            raise ValueError(f"{len(prompts)} prompts for {used} images: give one prompt, or one for each image")

    def predict_each(
        self,
        images: Any,
        prompts: Sequence[Prompt | EncodedPrompt],
        *,
        threshold: float | None = None,
        top_k: int | None = None,
        nms: float | None = None,
        nms_per_label: bool = True,
        batch_size: int = 1,
    ) -> list[list[Detections]]:
        """Every prompt on every image: result[image][prompt]. Options as in `predict`."""
        keep = DetectionFilter(threshold, top_k, nms, nms_per_label)
        _check_prompts(prompts)
        encoded = self._encode_prompts(prompts)
        results: list[list[Detections]] = []
        for group in self._groups(images, batch_size):
            pairs = [(image, prompt) for image in group for prompt in encoded]
            found = iter(self._detect(pairs, keep))
            results += [list(islice(found, len(encoded))) for _ in group]
        return results

    def encode_image(self, image: Any) -> EncodedImage:
        """The image half, to ask one image several things in separate calls."""
        (group,) = self._groups([image], 1)
        return group[0]

    def encode_prompt(self, prompt: Prompt) -> EncodedPrompt:
        """The text half, to look for the same in images that come one by one."""
        return self._encode_prompts([prompt])[0]

    def _groups(self, images: Any, batch_size: int) -> Iterator[list[EncodedImage]]:
        """Images encoded together. One that is encoded already is a group of its own."""
        _check_number("batch_size", batch_size, Integral)
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: at least 1")
        waiting: list[Any] = []
        for image in [images] if isinstance(images, EncodedImage) else each_image(images):
            if waiting and (len(waiting) == batch_size or isinstance(image, EncodedImage)):
                yield self._encode_images(waiting)
                waiting = []
            if isinstance(image, EncodedImage):
                yield [image]
            else:
                waiting.append(image)
        if waiting:
            yield self._encode_images(waiting)

    def _sliced(self, images: Any, tiles: Tiles) -> Iterator[list[list[Slice]]]:
        """Images one by one, each as its tiles."""
        for image in each_image(images):
            if isinstance(image, EncodedImage):
                raise ValueError("an EncodedImage cannot be sliced into tiles: give the image")
            yield [slice_image(load_image(image), tiles, self.scale)]

    def _encode_images(self, images: Sequence[Any]) -> list[EncodedImage]:
        return self.engine.encode_images([resize_for_inference(load_image(image), self.scale) for image in images])

    def _encode_prompts(self, prompts: Sequence[Prompt | EncodedPrompt]) -> list[EncodedPrompt]:
        limit = self.model.config.max_tokens
        new = [resolve(p, self.tokenizer, limit) for p in prompts if not isinstance(p, EncodedPrompt)]
        encoded = iter(self.engine.encode_prompts(new))
        return [p if isinstance(p, EncodedPrompt) else next(encoded) for p in prompts]

    def _detect(
        self, pairs: Sequence[tuple[Any, EncodedPrompt]], keep: DetectionFilter, tiles: Tiles | None = None
    ) -> Iterator[Detections]:
        """One `Detections` for each pair of an `EncodedImage`, or with tiles a list of `Slice`, and a prompt."""
        per_caption = max(TOP_K_PER_CAPTION, keep.top_k or 0)
        if tiles is None:
            rankings = self.engine.rank(pairs, per_caption)
        else:
            rankings = chain.from_iterable(
                rank_slices(self.engine, [slices], prompt, per_caption, tiles) for slices, prompt in pairs
            )
        for ranked, (_, prompt) in zip(rankings, pairs, strict=True):
            yield filter_detections(ranked, prompt.resolved, keep)


def _check_prompts(prompts: object) -> None:
    """Of a list. Before any image is opened."""
    wrong = [prompts]
    if isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes):
        wrong = [prompt for prompt in prompts if not isinstance(prompt, Prompt | EncodedPrompt)]
    if wrong:
        shown = " ".join(reprlib.repr(wrong[0]).split())
        raise ValueError(f"a prompt is Categories, Vocabulary, Phrases, Spans or Referring, got {shown}")


def _named_prompt(
    categories: Sequence[str] | str | None,
    phrases: str | None,
    spans: tuple[str, Sequence[Sequence[Sequence[int]]]] | None,
    referring: str | None,
    scoring: Scoring,
) -> Prompt:
    given = [prompt for prompt in (categories, phrases, spans, referring) if prompt is not None]
    if len(given) != 1:
        raise ValueError(f"give one of prompts, categories, phrases, spans and referring, got {len(given)}")
    if categories is not None:
        return Categories(categories)
    if phrases is not None:
        return Phrases(phrases)
    if spans is not None:
        if not isinstance(spans, Sequence) or isinstance(spans, str) or len(spans) != 2:
            raise ValueError("spans is (caption, spans): a caption and, for each object, its list of [start, end)")
        return Spans(*spans)
    assert referring is not None
    return Referring(referring, scoring)


def filter_detections(ranked: RankedBoxes, prompt: ResolvedPrompt, keep: DetectionFilter) -> Detections:
    """The boxes that a filter keeps, with the names of their labels."""
    boxes, scores, labels = ranked.boxes, ranked.scores, ranked.labels
    threshold = keep.threshold
    if threshold is None:
        threshold = 0.0 if prompt.one_object else THRESHOLD
    least: float | Tensor = threshold
    if prompt.vocabulary is not None:  # a name's own threshold comes first
        own = [threshold if one is None else one for one in prompt.vocabulary.thresholds]
        least = torch.tensor(own)[labels]
    rows = (scores >= least).nonzero()[:, 0]
    if keep.nms is not None:
        competing = labels[rows] if keep.nms_per_label else None
        rows = rows[postprocess.suppress(boxes[rows], scores[rows], competing, keep.nms)]
    top_k = 1 if keep.top_k is None and prompt.one_object else keep.top_k
    rows = rows[:top_k]
    found = labels[rows].tolist()
    return Detections(
        boxes=boxes[rows],
        scores=scores[rows],
        labels=labels[rows],
        names=tuple(prompt.names[label] for label in found),
        spans=None if prompt.spans is None else tuple(prompt.spans[label] for label in found),
    )
