"""Referring expressions: every sentence of a photograph is asked at once, and the image half runs once for them.

Axes: Q queries, T text tokens, K boxes kept.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from groundingdino.data.annotations import Expression
from groundingdino.evaluation import metrics
from groundingdino.evaluation.metrics import Answer
from groundingdino.inference import postprocess
from groundingdino.inputs import noun_phrases, text
from groundingdino.inputs.images import DEFAULT_SCALE, ImageGeometry, collate_images, open_image, resize_for_inference
from groundingdino.model import GroundingDINO
from groundingdino.runtime import devices, distributed
from groundingdino.structures import to_device

Scoring = Literal["max", "subject"]
SCORING = {
    "max": "best token of the sentence, special tokens included (mmdet)",
    "subject": "mean over the tokens of the subject phrase (LLMDet)",
}
IMAGE_COST = 1.5  # the image half takes as long as this many sentences (Swin-B); for the balance between ranks


@dataclass(frozen=True)
class EvaluationOptions:
    """How expressions are evaluated."""

    scoring: Scoring = "max"
    batch_size: int | None = None  # sentences of one photograph that run together; None: as suits the device
    precision: str = "fp32"
    scale: tuple[int, int] = DEFAULT_SCALE  # most pixels of the short and long side
    workers: int = 2  # processes that load photographs; 0: this one

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.scoring not in SCORING:
            raise ValueError(f"scoring {self.scoring!r}: use one of {', '.join(SCORING)}")


@dataclass(frozen=True)
class Evaluation:
    """The result of all ranks together, the same on each of them."""

    precision: dict[str, dict[int, float]]  # data set -> k -> Precision@k in [0, 1]
    average_precision: float  # in [0, 1]
    answers: tuple[Answer, ...]  # one an expression, in their order
    photographs: int
    seconds: float
    options: EvaluationOptions

    def report(self) -> dict[str, Any]:
        """Plain data for a JSON file, with the protocol named."""
        short, long = self.options.scale
        scoring = f"{self.options.scoring}: {SCORING[self.options.scoring]}"
        if self.options.scoring == "subject":
            # Which tagger is installed matters.
            scoring += f", found with part-of-speech tags by {noun_phrases.which_tagger()}"
        return {
            "protocol": {
                "precision": f"RefExp Precision@k: a box among the first k has IoU >= {metrics.HIT_IOU}",
                "average_precision": "COCO AP at IoU 0.5:0.95, class-agnostic, each expression an image of its own, "
                f"{metrics.AP_DETECTIONS} boxes each",
                "scoring": scoring,
                "image": f"into {short}x{long} pixels, Pillow bilinear",
                "arithmetic": self.options.precision,
            },
            "precision": {name: {str(k): p for k, p in row.items()} for name, row in self.precision.items()},
            "average_precision": self.average_precision,
            "expressions": len(self.answers),
            "photographs": self.photographs,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Photograph:
    """One image file and the expressions about it."""

    path: Path
    members: tuple[int, ...]  # indices of the expressions
    entry: int  # number of the first one's entry in the annotation file, for messages


def group_by_photograph(expressions: Sequence[Expression], images: Path) -> tuple[Photograph, ...]:
    """The photographs in the order of their first expression."""
    members: dict[str, list[int]] = {}
    for index, expression in enumerate(expressions):
        members.setdefault(expression.file_name, []).append(index)
    return tuple(
        Photograph(images / name, tuple(indices), expressions[indices[0]].number) for name, indices in members.items()
    )


def share(photographs: Sequence[Photograph], rank: int, world_size: int) -> tuple[Photograph, ...]:
    """The photographs of one rank; all ranks' together are all, and take about equally long."""
    load = [0.0] * world_size
    mine = set()
    by_cost = sorted(range(len(photographs)), key=lambda n: -len(photographs[n].members))
    for number in by_cost:
        least = load.index(min(load))
        load[least] += IMAGE_COST + len(photographs[number].members)
        if least == rank:
            mine.add(number)
    return tuple(photographs[number] for number in sorted(mine))


def evaluate_referring(
    model: GroundingDINO,
    expressions: Sequence[Expression],
    images: Path,
    options: EvaluationOptions | None = None,
    *,
    device: torch.device | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Ask a model every expression once; under torchrun the ranks share the photographs.

    Args:
        model: on `device`; it is put in eval mode, and back.
        expressions: from `data.load_expressions`, the same on every rank.
        images: folder of the photographs.
        options: see `EvaluationOptions`.
        device: default is the model's.
        progress: called with the number of expressions after each photograph of this rank.

    Raises:
        ValueError: naming an image that is missing or unreadable.
    """
    options = options or EvaluationOptions()
    device = device or next(model.parameters()).device
    photographs = group_by_photograph(expressions, images)
    begin = time.perf_counter()
    answers: list[Answer] = []
    was_training = model.training
    model.eval()
    try:
        for members, pixels, scale_factor in _load(share_of_this_rank(photographs), options):
            captions = [expressions[index].caption for index in members]
            found = ask(model, pixels, scale_factor, captions, options, device)
            answers += [Answer(index, *ranked) for index, ranked in zip(members, found, strict=True)]
            if progress is not None:
                progress(len(members))
    finally:
        model.train(was_training)
    gathered = sorted((a for part in distributed.gather_objects(answers) for a in part), key=lambda a: a.index)
    figures = None
    if distributed.is_main():
        seconds = time.perf_counter() - begin
        figures = metrics.precision(expressions, gathered), metrics.average_precision(expressions, gathered), seconds
    precision, average_precision, seconds = distributed.broadcast_object(figures)  # type: ignore[misc]
    return Evaluation(precision, average_precision, tuple(gathered), len(photographs), seconds, options)


def share_of_this_rank(photographs: Sequence[Photograph]) -> tuple[Photograph, ...]:
    """`share` by the process group."""
    return share(photographs, distributed.rank(), distributed.world_size())


@torch.inference_mode()
def ask(
    model: GroundingDINO,
    pixels: Tensor,
    scale_factor: tuple[float, float],
    captions: Sequence[str],
    options: EvaluationOptions,
    device: torch.device,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One photograph, (3, h, w) uint8, and its sentences -> for each, boxes (K, 4) and scores (K,), best first.

    A sentence is lower-cased by the tokenizer only, closed with ". " and, as in mmdet, cut off at 256 tokens.
    """
    batch = to_device(collate_images([pixels]), device)
    tokenizer, limit = text.default_tokenizer(), model.config.max_tokens
    encoded = [tokenizer.encode(text.finish_caption(caption)) for caption in captions]
    subjects: list[list[int]] = [[]] * len(captions)  # the tokens of each sentence's subject
    if options.scoring == "subject":
        found = [noun_phrases.subject_tokens(c, e) for c, e in zip(captions, encoded, strict=True)]
        subjects = [[token for token in tokens if token < limit] for tokens in found]
    with devices.autocast(device, options.precision):
        image = model.encode_image(batch)
        # All sentences at once: a few words each, so that reading BERT's weights takes longer than computing with them.
        features = model.encode_text(to_device(text.collate_text(encoded, limit), device))  # (sentences, T, D)
    together = options.batch_size or devices.pairs_at_once(device)
    for start in range(0, len(captions), together):
        group = slice(start, start + together)
        words = to_device(text.collate_text(encoded[group], limit), device)
        with devices.autocast(device, options.precision):
            tokens = image.take([0] * len(encoded[group]))
            last = model.detect(tokens, features[group, : words.token_ids.shape[1]], words).layers[-1]
        logits, boxes = last.logits.float(), last.boxes.float()
        scores = torch.stack(
            [_score(row, subject, options.scoring) for row, subject in zip(logits, subjects[group], strict=True)]
        )
        placed = postprocess.to_image_frame(boxes, ImageGeometry(batch.sizes[0], scale_factor))
        best = scores.topk(min(metrics.AP_DETECTIONS, scores.shape[1]), dim=1)
        kept = placed.gather(1, best.indices[:, :, None].expand(-1, -1, 4))
        rows = torch.cat([kept, best.values[:, :, None]], dim=2).cpu().numpy()  # the one transfer of these sentences
        yield from ((row[:, :4], row[:, 4]) for row in rows)


def _score(logits: Tensor, subject: list[int], scoring: Scoring) -> Tensor:
    """(Q, T) -> (Q,). Without a subject's token in reach the sentence's best token counts."""
    if scoring == "max" or not subject:
        return postprocess.referring_scores(logits)
    named = torch.zeros(1, logits.shape[1], dtype=torch.bool, device=logits.device)
    named[0, subject] = True
    return postprocess.category_scores(logits, named)[:, 0]


Loaded = tuple[tuple[int, ...], Tensor, tuple[float, float]]  # members, pixels, scale factor


def _load(photographs: Sequence[Photograph], options: EvaluationOptions) -> Iterator[Loaded]:
    loader = DataLoader(
        _Photographs(photographs, options.scale),
        batch_size=None,
        num_workers=min(options.workers, len(photographs)),
        generator=torch.Generator().manual_seed(0),  # else torch's global generator would be drawn from
    )
    for loaded in loader:
        if isinstance(loaded, str):
            raise ValueError(loaded)
        yield loaded


class _Photographs(Dataset[Loaded | str]):
    """Decoded and resized photographs; a message where that fails, as errors cross processes with a page of text."""

    def __init__(self, photographs: Sequence[Photograph], scale: tuple[int, int]):
        self.photographs, self.scale = photographs, scale

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, number: int) -> Loaded | str:
        photograph = self.photographs[number]
        try:
            image = open_image(photograph.path)
        except ValueError as error:
            return f"{error}, wanted by images entry {photograph.entry} of the annotations"
        resized = resize_for_inference(image, self.scale)
        return photograph.members, resized.pixels, resized.geometry.scale_factor
