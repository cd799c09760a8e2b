"""Encoded images x resolved prompts -> ranked boxes. Every user of the model goes this way.

    engine = Engine(model)
    images = engine.encode_images([resize_for_inference(open_image(path))])
    prompts = engine.encode_prompts([resolve(Categories(["cat", "dog"]), default_tokenizer())])
    for ranked in engine.rank([(image, prompt) for image in images for prompt in prompts], keep=300):
        ...

An image is encoded once, whatever is asked about it; a caption is encoded once, however many images it is for.
Axes: B images, T text tokens, D width, C labels of a caption, Q queries, K boxes kept.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from groundingdino.inference import postprocess
from groundingdino.inference.compiled import CompiledDetector
from groundingdino.inference.prompts import CaptionChunk, ResolvedPrompt
from groundingdino.inference.vocabulary import Vocabulary
from groundingdino.inputs.images import ImageGeometry, ResizedImage, collate_images
from groundingdino.inputs.text import collate_text
from groundingdino.model.detector import GroundingDINO
from groundingdino.model.image_tokens import ImageTokens
from groundingdino.runtime import devices, threads
from groundingdino.structures import ImageBatch, TextBatch, to_device

TOP_K_PER_CAPTION = 300  # mmdet's cut, for each chunk of a category list
CAPTIONS_PER_PASS = 16  # of the text half: most are a few words, and reading BERT takes longer than computing with it


@dataclass(frozen=True)
class EncodedImage:
    """The image half of one image, on the model's device."""

    tokens: ImageTokens  # of the batch that it was encoded in
    row: int
    geometry: ImageGeometry


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt with its text half, on the model's device."""

    resolved: ResolvedPrompt
    features: tuple[Tensor, ...]  # (T, D), one a chunk
    positive_maps: tuple[Tensor | None, ...]  # (C, T) bool, one a chunk; see `CaptionChunk`


@dataclass(frozen=True)
class RankedBoxes:
    """The best boxes of one image for one prompt, on the CPU, best first."""

    boxes: Tensor  # (K, 4) float32, xyxy in pixels of the original image
    scores: Tensor  # (K,) float32, falling; in [0, 1] but for the scoring "llmdet", see `postprocess.side_bonus`
    labels: Tensor  # (K,) int64, index into the prompt's names

    def folded(self, vocabulary: Vocabulary) -> "RankedBoxes":
        """Labels that index the texts of a vocabulary -> its names; see `postprocess.fold`."""
        rows, names = postprocess.fold(self.boxes, self.scores, self.labels, vocabulary.roles)
        return RankedBoxes(self.boxes[rows], self.scores[rows], names)


@dataclass(frozen=True)
class _Work:
    """One caption for one image: a row of a pass."""

    image: EncodedImage
    chunk: CaptionChunk
    features: Tensor  # (T, D)
    positive_map: Tensor | None  # (C, T)
    prompt: ResolvedPrompt
    last: bool  # of its prompt


@dataclass(frozen=True)
class _Transfer:
    """Rankings on their way to the host."""

    prompts: Sequence[ResolvedPrompt]
    lengths: Sequence[int]  # rows of each
    wait: Callable[[], Tensor]


class Engine:
    """Runs the two halves of a model and the rest.

    Args:
        model: in eval mode, with its weights in the type that they are to be computed with.
        device: where the model is; default is where its parameters are.
        autocast: "fp32" for none, "bf16" or "fp16": float32 weights, and torch picks the type operator by operator.
        pairs_per_pass: (image, caption) pairs that run together; default is what suits the device.
        name: what to call the model in messages, such as its checkpoint.
        compile: run the model's parts as torch compiles them; see `inference.compiled`.
    """

    def __init__(
        self,
        model: GroundingDINO,
        device: torch.device | None = None,
        autocast: str = "fp32",
        pairs_per_pass: int | None = None,
        name: str = "the model",
        compile: bool = False,
    ) -> None:
        weight = next(model.parameters())
        self.model = model
        self.device = device or weight.device
        self.name = name
        self.pairs_per_pass = pairs_per_pass or devices.pairs_at_once(self.device)
        self._dtype = weight.dtype
        self._autocast = autocast
        self._parts = CompiledDetector(model) if compile else model

    def encode_images(self, images: Sequence[ResizedImage]) -> list[EncodedImage]:
        """The images' halves, encoded as one batch, padded to the largest."""
        batch = collate_images([image.pixels for image in images])
        return self.encode_batch(batch, [image.geometry for image in images])

    @torch.no_grad()
    def encode_batch(self, batch: ImageBatch, geometries: Sequence[ImageGeometry]) -> list[EncodedImage]:
        """`encode_images` of a batch that is collated already."""
        threads.adjust()
        batch = to_device(batch, self.device)
        batch = replace(batch, pixels=batch.pixels.to(self._dtype))
        with devices.autocast(self.device, self._autocast):
            tokens = self._parts.encode_image(batch)
        return [EncodedImage(tokens, row, geometry) for row, geometry in enumerate(geometries)]

    @torch.no_grad()
    def encode_prompts(
        self, prompts: Sequence[ResolvedPrompt], known: dict[tuple[int, ...], Tensor] | None = None
    ) -> list[EncodedPrompt]:
        """The prompts' text halves. Captions that several prompts have in common are encoded once.

        `known` holds features (T, D) by token ids from earlier calls; what is new is added to it.
        """
        threads.adjust()
        features = {} if known is None else known
        captions = {chunk.caption.token_ids: chunk.caption for prompt in prompts for chunk in prompt.chunks}
        new = [caption for token_ids, caption in captions.items() if token_ids not in features]
        for start in range(0, len(new), CAPTIONS_PER_PASS):
            group = new[start : start + CAPTIONS_PER_PASS]
            batch = to_device(collate_text(group, self.model.config.max_tokens), self.device)
            with devices.autocast(self.device, self._autocast):
                encoded = self._parts.encode_text(batch)  # (B, T, D)
            for caption, row in zip(group, encoded, strict=True):
                features[caption.token_ids] = row[: len(caption.token_ids)]
        return [
            EncodedPrompt(
                resolved=prompt,
                features=tuple(
                    chunk.with_learned(features[chunk.caption.token_ids], self.model.config.name)
                    for chunk in prompt.chunks
                ),
                positive_maps=tuple(_moved(chunk.positive_map, self.device) for chunk in prompt.chunks),
            )
            for prompt in prompts
        ]

    def rank(self, pairs: Iterable[tuple[EncodedImage, EncodedPrompt]], keep: int) -> Iterator[RankedBoxes]:
        """One `RankedBoxes` for each pair, in order, with at most `keep` boxes for each caption of its prompt.

        Captions of all pairs share the passes. A prompt's boxes are sorted on the device, and the prompts that end in a
        pass go to the host together, while an accelerator computes the next pass. Pairs of one batch of images should
        be neighbours: a pass holds images of one batch only.

        Raises:
            ValueError: if the model gives boxes or scores that are not finite.
        """
        ahead = 0 if self.device.type == "cpu" else 1
        parts: list[Tensor] = []
        under_way: deque[_Transfer] = deque()
        for work in self._passes(pairs):
            prompts, rows = [], []
            for item, own in zip(work, self._ranked_rows(work, keep), strict=True):
                parts.append(own)
                if item.last:
                    prompts.append(item.prompt)
                    rows.append(_sorted(parts))
                    parts = []
            if prompts:
                under_way.append(_Transfer(prompts, [len(own) for own in rows], devices.to_host(torch.cat(rows))))
            while len(under_way) > ahead:
                yield from self._received(under_way.popleft())
        for transfer in under_way:
            yield from self._received(transfer)

    def _received(self, transfer: "_Transfer") -> Iterator[RankedBoxes]:
        found = transfer.wait()
        if not torch.isfinite(found).all():
            raise ValueError(
                f"{self.name} gives boxes or scores that are not finite: its weights are damaged, or too large for "
                "this precision (try fp32)"
            )
        for prompt, rows in zip(transfer.prompts, found.split(transfer.lengths), strict=True):
            ranked = RankedBoxes(rows[:, :4], rows[:, 4], rows[:, 5].long())
            yield ranked if prompt.vocabulary is None else ranked.folded(prompt.vocabulary)

    def token_logits(self, image: EncodedImage, prompt: EncodedPrompt) -> Iterator[tuple[Tensor, Tensor]]:
        """For each caption of the prompt: logits (Q, T) before the sigmoid and boxes (Q, 4), on the model's device.

        Boxes are cxcywh in [0, 1] of the resized image.
        """
        for work in self._passes([(image, prompt)]):
            logits, boxes = self._detect(work)
            for item, own_logits, own_boxes in zip(work, logits, boxes, strict=True):
                yield own_logits[:, : len(item.features)], own_boxes

    def _passes(self, pairs: Iterable[tuple[EncodedImage, EncodedPrompt]]) -> Iterator[list[_Work]]:
        waiting: list[_Work] = []
        for image, prompt in pairs:
            count = len(prompt.resolved.chunks)
            for index, chunk in enumerate(prompt.resolved.chunks):
                if waiting and (len(waiting) == self.pairs_per_pass or waiting[0].image.tokens is not image.tokens):
                    yield waiting
                    waiting = []
                features, positive_map = prompt.features[index], prompt.positive_maps[index]
                waiting.append(_Work(image, chunk, features, positive_map, prompt.resolved, index == count - 1))
        if waiting:
            yield waiting

    @torch.no_grad()
    def _detect(self, work: Sequence[_Work]) -> tuple[Tensor, Tensor]:
        """Logits (B, Q, T) and boxes (B, Q, 4), float32."""
        threads.adjust()
        text = to_device(collate_text([item.chunk.caption for item in work], self.model.config.max_tokens), self.device)
        tokens = work[0].image.tokens.take([item.image.row for item in work])
        with devices.autocast(self.device, self._autocast):
            output = self._parts.detect(tokens, _padded([item.features for item in work], text), text)
        return output.layers[-1].logits.float(), output.layers[-1].boxes.float()

    @torch.no_grad()
    def _ranked_rows(self, work: Sequence[_Work], keep: int) -> Sequence[Tensor]:
        """For each item (K, 6) on the device: box in pixels of the original image, score, label."""
        logits, boxes = self._detect(work)
        rows = []
        for index, item in enumerate(work):
            scores = _scores(logits[index, :, : len(item.features)], item.positive_map)
            placed = postprocess.to_image_frame(boxes[index], item.image.geometry)
            sides = item.chunk.sides
            count = min(keep, postprocess.SIDE_CANDIDATES) if sides else keep
            best, values, labels = postprocess.top_detections(scores, placed, count)
            if sides:
                values = values + postprocess.side_bonus(best, sides, item.image.geometry)  # sorted by `_sorted`
            labels = labels + item.chunk.first_label  # float32 holds integers up to 2 ** 24
            rows.append(torch.cat((best, values[:, None], labels[:, None].to(best.dtype)), dim=1))
        return rows


def _moved(positive_map: Tensor | None, device: torch.device) -> Tensor | None:
    return None if positive_map is None else devices.send(positive_map, device)


def _padded(features: Sequence[Tensor], text: TextBatch) -> Tensor:
    """(T_i, D) each -> (B, T, D) with zeros behind."""
    padded = features[0].new_zeros(*text.token_ids.shape, features[0].shape[1])
    for row, feature in zip(padded, features, strict=True):
        row[: len(feature)] = feature
    return padded


def _scores(logits: Tensor, positive_map: Tensor | None) -> Tensor:
    """logits (Q, T) -> (Q, C) by the labels' tokens, or (Q,) by the best of all tokens."""
    if positive_map is None:
        return postprocess.referring_scores(logits)
    return postprocess.category_scores(logits, positive_map)


def _sorted(parts: Sequence[Tensor]) -> Tensor:
    """The rows (K, 6) of a prompt's captions as one ranking."""
    rows = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return rows[rows[:, 4].argsort(descending=True, stable=True)]
