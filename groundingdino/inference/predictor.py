"""Images and prompts -> `Detections`. The image half and the text half of the model each run once per call.

Axes: B images, T text tokens, D width, C categories, Q queries, K detections.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundingdino.checkpoints.model_file import image_scale, load_detector
from groundingdino.inference import postprocess
from groundingdino.inference.prompts import (
    Categories,
    Phrases,
    Piece,
    Prompt,
    Referring,
    ResolvedPrompt,
    Scoring,
    Spans,
    resolve,
)
from groundingdino.inputs.images import (
    DEFAULT_SCALE,
    ImageGeometry,
    collate_images,
    each_image,
    is_one_image,
    load_image,
    resize_for_inference,
)
from groundingdino.inputs.text import collate_text, default_tokenizer
from groundingdino.model.detector import GroundingDINO
from groundingdino.model.feature_enhancer import ImageTokens
from groundingdino.runtime import devices
from groundingdino.structures import Detections, ImageBatch, TextBatch, to_device

THRESHOLD = 0.3  # default of every mode but referring
TOP_K_PER_CAPTION = 300  # mmdet's cut, for each piece of a category list
CAPTIONS_AT_ONCE = 16  # in the text half: mostly a few words, and reading BERT takes longer than computing with it
PRECISIONS = ("fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed")


@dataclass(frozen=True)
class EncodedImage:
    """The image half of one image, on the model's device; takes an image's place in any call."""

    tokens: ImageTokens  # of the batch that it was encoded in
    row: int
    geometry: ImageGeometry


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt with its text half, on the model's device; takes a prompt's place in any call."""

    resolved: ResolvedPrompt
    features: tuple[Tensor, ...]  # (T, D), one a piece


@dataclass(frozen=True)
class Limits:
    """Which detections are kept: threshold, then NMS, then the best."""

    threshold: float | None = None  # None: 0.3, and 0 for a referring sentence
    top_k: int | None = None  # None: all (mmdet's 300 of each caption), and 1 for a referring sentence
    nms: float | None = None  # IoU over which the worse box goes; None: no suppression, as in mmdet
    nms_per_label: bool = True  # boxes compete within their label only

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold} is not in [0, 1]")
        if self.nms is not None and not 0 <= self.nms <= 1:
            raise ValueError(f"nms {self.nms} is an IoU, so in [0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k}: keep at least one detection")


def load_model(
    path: str | Path,
    device: str = "auto",
    precision: str = "fp32",
    scale: tuple[int, int] | None = None,
) -> "Predictor":
    """A predictor from one checkpoint file.

    Args:
        path: a checkpoint that `convert_checkpoint.py` or training wrote.
        device: "auto", "cpu", "cuda", "cuda:1", "npu:0", ...
        precision: see `Predictor`.
        scale: see `Predictor`; default is what the checkpoint was trained for, (800, 1333) where it does not say.
    Raises:
        ValueError: one line about what is wrong with the file, the device or the precision.
    """
    chosen = devices.pick_device(device)
    devices.configure(chosen)
    model = load_detector(path, chosen)
    return Predictor(model, chosen, precision, scale or image_scale(path, DEFAULT_SCALE))


class Predictor:
    """A detector with everything around it. Not for training: the model is moved, cast and put in eval mode.

    Args:
        model: a `GroundingDINO`.
        device: where to run; default is where the model is.
        precision: "fp32"; "bf16" or "fp16", where the weights are cast, too: half the memory; "bf16-mixed" or
            "fp16-mixed", where they stay float32 and autocast picks the type operator by operator.
        scale: (short side, long side) in pixels that an image is resized to fit into.
    Raises:
        ValueError: for an unknown precision.
    """

    def __init__(
        self,
        model: GroundingDINO,
        device: torch.device | None = None,
        precision: str = "fp32",
        scale: tuple[int, int] = DEFAULT_SCALE,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
        self.device = next(model.parameters()).device if device is None else device
        base, _, mixed = precision.partition("-")
        self._autocast = base if mixed else "fp32"
        self._dtype = torch.float32 if mixed else devices.PRECISIONS[base]
        self.model = model.eval().to(self.device, self._dtype)
        self.scale = scale
        self.pairs_at_once = devices.pairs_at_once(self.device)
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
    ) -> Detections | list[Detections]:
        """Find what one prompt, or one prompt per image, asks for.

        Args:
            images: a path, Pillow image, uint8 RGB array, (3, H, W) tensor or `EncodedImage`; or a folder, a batch,
                or an iterable of these.
            prompts: one prompt for all images, or a list with one for each: `Categories`, `Phrases`, `Spans`,
                `Referring` or `EncodedPrompt`. Instead, one of the next four:
            categories: names, or one string "cat . dog ."; any number, split into several captions as needed.
            phrases: a caption whose noun phrases are looked for.
            spans: (caption, for each object its list of character spans [start, end)).
            referring: a sentence about one object; `scoring` as in `prompts.Referring`.
            threshold: least score; default 0.3, and 0 for `referring`.
            top_k: most detections of an image; default all (300 a caption), and 1 for `referring`.
            nms: IoU over which the worse of two boxes goes; default off. Between equal labels only, unless
                `nms_per_label` is False.
            batch_size: images that run together. Alone (1) an image's result depends on nothing but itself; in a
                batch it is padded to the largest.

        Returns:
            `Detections` on the CPU, best first, for a single image; else a list, in order.
        Raises:
            ValueError: what was wrong with an image, a prompt or an option, and what to do.
        """
        limits = Limits(threshold, top_k, nms, nms_per_label)
        if prompts is None:
            prompts = _named_prompt(categories, phrases, spans, referring, scoring)
        elif not (categories is phrases is spans is referring is None):
            raise ValueError("give prompts or one of categories, phrases, spans, referring, not both")
        single = is_one_image(images)
        found = list(self.stream(images, prompts, limits, batch_size))
        return found[0] if single else found

    def stream(
        self,
        images: Any,
        prompts: Prompt | EncodedPrompt | Sequence[Prompt | EncodedPrompt],
        limits: Limits | None = None,
        batch_size: int = 1,
    ) -> Iterator[Detections]:
        """`predict` for any number of images, one batch at a time: images are opened when they are needed."""
        limits = limits or Limits()
        if isinstance(prompts, Prompt | EncodedPrompt):
            (encoded,) = self._encode_prompts([prompts])
            for group in self._groups(images, batch_size):
                yield from self._detect(group, [(row, encoded) for row in range(len(group))], limits)
            return
        if not isinstance(prompts, Sequence) or isinstance(prompts, str):
            raise ValueError(f"a prompt is Categories, Phrases, Spans or Referring, got {prompts!r}")
        used = 0
        for group in self._groups(images, batch_size):
            own = self._encode_prompts(prompts[used : used + len(group)])
            used += len(group)
            if len(own) < len(group):
                raise ValueError(f"{len(prompts)} prompts for more images: give one prompt, or one for each image")
            yield from self._detect(group, list(enumerate(own)), limits)
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
        limits = Limits(threshold, top_k, nms, nms_per_label)
        encoded = self._encode_prompts(prompts)
        results: list[list[Detections]] = []
        for group in self._groups(images, batch_size):
            pairs = [(row, prompt) for row in range(len(group)) for prompt in encoded]
            found = iter(self._detect(group, pairs, limits))
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

    @torch.no_grad()
    def _encode_images(self, images: Iterable[Any]) -> list[EncodedImage]:
        resized = [resize_for_inference(load_image(image), self.scale) for image in images]
        batch = to_device(collate_images([image.pixels for image in resized]), self.device)
        tokens = self._encode_batch(batch)
        return [EncodedImage(tokens, row, image.geometry) for row, image in enumerate(resized)]

    def _encode_batch(self, batch: ImageBatch) -> ImageTokens:
        with devices.autocast(self.device, self._autocast):
            return self.model.encode_image(replace(batch, pixels=batch.pixels.to(self._dtype)))

    @torch.no_grad()
    def _encode_prompts(self, prompts: Sequence[Prompt | EncodedPrompt]) -> list[EncodedPrompt]:
        """Each distinct caption runs through the text half once."""
        limit = self.model.config.max_tokens
        resolved = [p.resolved if isinstance(p, EncodedPrompt) else resolve(p, self.tokenizer, limit) for p in prompts]
        new = [r for p, r in zip(prompts, resolved, strict=True) if not isinstance(p, EncodedPrompt)]
        captions = {piece.caption.token_ids: piece.caption for prompt in new for piece in prompt.pieces}
        features: dict[tuple[int, ...], Tensor] = {}
        remaining = iter(captions.items())
        while group := list(islice(remaining, CAPTIONS_AT_ONCE)):
            batch = to_device(collate_text([caption for _, caption in group], limit), self.device)
            with devices.autocast(self.device, self._autocast):
                encoded = self.model.encode_text(batch)  # (B, T, D)
            features.update({ids: row[: len(ids)] for (ids, _), row in zip(group, encoded, strict=True)})
        return [
            p if isinstance(p, EncodedPrompt)
            else EncodedPrompt(r, tuple(features[piece.caption.token_ids] for piece in r.pieces))
            for p, r in zip(prompts, resolved, strict=True)
        ]  # fmt: skip

    @torch.no_grad()
    def _detect(
        self, images: list[EncodedImage], pairs: list[tuple[int, EncodedPrompt]], limits: Limits
    ) -> Iterator[Detections]:
        """One answer a pair (index of the image, prompt), in order. Pieces of all prompts share the passes."""
        tokens = images[0].tokens
        work = [
            (pair, row, piece, features)
            for pair, (row, prompt) in enumerate(pairs)
            for piece, features in zip(prompt.resolved.pieces, prompt.features, strict=True)
        ]
        keep = max(TOP_K_PER_CAPTION, limits.top_k or 0)
        parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in pairs]
        for start in range(0, len(work), self.pairs_at_once):
            batch = work[start : start + self.pairs_at_once]
            captions = [piece.caption for _, _, piece, _ in batch]
            text = to_device(collate_text(captions, self.model.config.max_tokens), self.device)
            features = _padded([feature for *_, feature in batch], text)
            with devices.autocast(self.device, self._autocast):
                output = self.model.detect(tokens.take([images[row].row for _, row, _, _ in batch]), features, text)
            logits, boxes = output.layers[-1].logits.float(), output.layers[-1].boxes.float()
            for index, (pair, row, piece, _) in enumerate(batch):
                parts[pair].append(_piece_detections(logits[index], boxes[index], piece, images[row].geometry, keep))
        for found, (_, prompt) in zip(parts, pairs, strict=True):
            yield _detections(found, prompt.resolved, limits)


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
        return Spans(*spans)
    assert referring is not None
    return Referring(referring, scoring)


def _padded(features: Sequence[Tensor], text: TextBatch) -> Tensor:
    """(T_i, D) each -> (B, T, D) with zeros behind."""
    padded = features[0].new_zeros(*text.token_ids.shape, features[0].shape[1])
    for row, feature in zip(padded, features, strict=True):
        row[: len(feature)] = feature
    return padded


def _piece_detections(
    logits: Tensor, boxes: Tensor, piece: Piece, geometry: ImageGeometry, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """logits (Q, T), boxes (Q, 4) -> boxes (K, 4) in the image's pixels, scores (K,), labels (K,), on the CPU."""
    logits = logits[:, : len(piece.caption.token_ids)]
    if piece.positive_map is None:
        scores = postprocess.referring_scores(logits)
    else:
        scores = postprocess.category_scores(logits, piece.positive_map.to(logits.device))
    placed = postprocess.to_image_frame(boxes, geometry.size, geometry.scale_factor)
    found, scores, labels = postprocess.top_detections(scores, placed, keep)
    return found.cpu(), scores.cpu(), labels.cpu() + piece.first_label


def _detections(parts: Sequence[tuple[Tensor, Tensor, Tensor]], prompt: ResolvedPrompt, limits: Limits) -> Detections:
    boxes, scores, labels = (torch.cat(columns) for columns in zip(*parts, strict=True))
    order = scores.argsort(descending=True, stable=True)
    threshold = limits.threshold
    if threshold is None:
        threshold = 0.0 if prompt.one_object else THRESHOLD
    order = order[scores[order] >= threshold]
    if limits.nms is not None:
        order = order[_suppress(boxes[order], scores[order], labels[order], limits.nms, limits.nms_per_label)]
    top_k = 1 if limits.top_k is None and prompt.one_object else limits.top_k
    order = order[:top_k]
    chosen = labels[order].tolist()
    return Detections(
        boxes=boxes[order],
        scores=scores[order],
        labels=labels[order],
        names=tuple(prompt.names[label] for label in chosen),
        spans=None if prompt.spans is None else tuple(prompt.spans[label] for label in chosen),
    )


def _suppress(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, per_label: bool) -> Tensor:
    from torchvision.ops import batched_nms, nms  # a second's import that few calls need

    return batched_nms(boxes, scores, labels, iou) if per_label else nms(boxes, scores, iou)
