"""Runs a model once on every question of a protocol: shards, loads, runs the engine, gathers. It knows no protocol.

A protocol is two functions in a file of its own, bound to its annotations:

* `questions() -> Sequence[Question]`: the image files, each with the prompts to ask about it.
* `score(answers) -> figures`: from one `ImageAnswer` for every prompt to figures of merit. It runs in the main process
  only, and `answers` is an iterator that is read once: each rank's answers come in its order of images, rank after
  rank, from files on disk. So a protocol holds what its figures need, never everything
  (LVIS: 20,000 images with 9,300 boxes each).

Under torchrun every image has one rank, and every rank gets the same `Evaluation`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from groundingdino.evaluation.annotation_file import ImageFile
from groundingdino.evaluation.answer_file import AnswerStore
from groundingdino.evaluation.answers import ImageAnswer
from groundingdino.inference.engine import TOP_K_PER_CAPTION, EncodedImage, EncodedPrompt, Engine, RankedBoxes
from groundingdino.inference.prompts import Prompt, resolve
from groundingdino.inputs.images import DEFAULT_SCALE, ResizedImage, open_image, resize_for_inference
from groundingdino.inputs.text import default_tokenizer
from groundingdino.model import GroundingDINO
from groundingdino.runtime import devices, distributed
from groundingdino.runtime.loader_process import batches, end_with_a_lost_batch

IMAGE_COST = 1.5  # the image half takes as long as this many prompts (Swin-B); for the balance between ranks
CAPTIONS_KEPT = 10_000  # whose text half is kept, as people say "left" of many images; a few kilobytes each

Figures = TypeVar("Figures")
Figures_co = TypeVar("Figures_co", covariant=True)


@dataclass(frozen=True)
class EvaluationOptions:
    """How a model is run, whatever the protocol."""

    batch_size: int | None = None  # captions of one image that run together; None: as suits the device
    precision: str = "fp32"  # "bf16" or "fp16": autocast
    scale: tuple[int, int] = DEFAULT_SCALE  # most pixels of the short and long side
    workers: int = 2  # processes that load images; 0: this one

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True)
class Question:
    """One image file and what is asked about it."""

    image: ImageFile
    prompts: tuple[Prompt, ...]  # where many images share one tuple (the same object), its captions are encoded once
    ids: tuple[int, ...]  # one for each prompt: the `image_id` of its answer, as the protocol counts
    where: str = ""  # in the annotations, for messages: "wanted by images entry 8 of the annotations"


class EvaluationProtocol(Protocol[Figures_co]):
    """What a protocol's class offers. Its fields hold the annotations, the same on every rank."""

    def questions(self) -> Sequence[Question]:
        """The images with their prompts, each file once."""
        ...

    def score(self, answers: Iterator[ImageAnswer]) -> Figures_co:
        """The figures, from one answer for every prompt, in any order of images."""
        ...


@dataclass(frozen=True)
class Evaluation(Generic[Figures]):
    """The result of all ranks together, the same on each of them."""

    figures: Figures
    images: int
    prompts: int
    seconds: float
    options: EvaluationOptions

    def report(self) -> dict[str, Any]:
        """Plain data for a JSON file: how the model was run, and for how long."""
        short, long = self.options.scale
        return {
            "protocol": {
                "image": f"into {short}x{long} pixels, Pillow bilinear",
                "arithmetic": self.options.precision,
            },
            "images": self.images,
            "prompts": self.prompts,
            "seconds": round(self.seconds, 3),
        }


def evaluate(
    model: GroundingDINO,
    protocol: EvaluationProtocol[Figures],
    options: EvaluationOptions | None = None,
    *,
    device: torch.device | None = None,
    boxes_per_caption: int = TOP_K_PER_CAPTION,
    name: str = "the model",
    progress: Callable[[int], None] | None = None,
    store: AnswerStore | None = None,
) -> Evaluation[Figures]:
    """The protocol's figures for a model; under torchrun the ranks share the images.

    Args:
        model: on `device`; it is put in eval mode, and back.
        protocol: the same on every rank.
        options: see `EvaluationOptions`.
        device: default is the model's.
        boxes_per_caption: how many an answer holds at most, for each caption that a prompt takes.
        name: what to call the model in messages, such as its checkpoint.
        progress: called with the number of prompts after each image of this rank; at first with those that `store`
            answers already.
        store: keeps the answers on disk, and may hold those of an evaluation that was interrupted; it is closed.

    Raises:
        ValueError: naming an image that is missing, unreadable or of another size than annotated, or a model whose
            answers are not finite.
    """
    options = options or EvaluationOptions()
    begin = time.perf_counter()
    questions = protocol.questions()
    engine = Engine(model, device, options.precision, options.batch_size, name)
    was_training = model.training
    model.eval()
    with store or AnswerStore() as store:
        try:
            answered = store.answered()
            waiting = [question for question in questions if not answered.issuperset(question.ids)]
            if progress is not None and answered and distributed.is_main():
                progress(sum(len(q.prompts) for q in questions) - sum(len(q.prompts) for q in waiting))
            own = shard(waiting, distributed.rank(), distributed.world_size())
            for question, ranked in _answers(engine, own, options, boxes_per_caption):
                distributed.note_progress()
                store.write([_as_answer(*one) for one in zip(question.ids, ranked, strict=True)])
                if progress is not None:
                    progress(len(question.prompts))
        finally:
            model.train(was_training)
        figures = _score_on_main(protocol, store)
    prompts = sum(len(question.prompts) for question in questions)
    seconds = distributed.broadcast_object(time.perf_counter() - begin)
    return Evaluation(figures, len(questions), prompts, seconds, options)


def shard(questions: Sequence[Question], rank: int, world_size: int) -> tuple[Question, ...]:
    """The questions of one rank, in order. All ranks' together are all, and take about equally long."""
    load = [0.0] * world_size
    mine = []
    for number in sorted(range(len(questions)), key=lambda n: -len(questions[n].prompts)):
        least = load.index(min(load))
        load[least] += IMAGE_COST + len(questions[number].prompts)
        if least == rank:
            mine.append(number)
    return tuple(questions[number] for number in sorted(mine))


def _answers(
    engine: Engine, questions: Sequence[Question], options: EvaluationOptions, boxes_per_caption: int
) -> Iterator[tuple[Question, list[RankedBoxes]]]:
    """Each question with one ranking for each of its prompts."""
    ranked = engine.rank(_pairs(engine, questions, options), boxes_per_caption)
    for question in questions:
        yield question, list(islice(ranked, len(question.prompts)))


def _pairs(
    engine: Engine, questions: Sequence[Question], options: EvaluationOptions
) -> Iterator[tuple[EncodedImage, EncodedPrompt]]:
    """Each image with each of its prompts, in order."""
    tokenizer, limit = default_tokenizer(), engine.model.config.max_tokens
    asked: tuple[Prompt, ...] = ()
    encoded: list[EncodedPrompt] = []
    known: dict[tuple[int, ...], Tensor] = {}
    for question, image in zip(questions, _load(questions, options, engine.device), strict=True):
        if question.prompts is not asked:
            resolved = [resolve(prompt, tokenizer, limit, strict=False) for prompt in question.prompts]
            if len(known) > CAPTIONS_KEPT:
                known.clear()
            asked, encoded = question.prompts, engine.encode_prompts(resolved, known)
        (encoded_image,) = engine.encode_images([image])
        yield from ((encoded_image, prompt) for prompt in encoded)


def _as_answer(image_id: int, ranked: RankedBoxes) -> ImageAnswer:
    return ImageAnswer(image_id, ranked.boxes.numpy(), ranked.scores.numpy(), ranked.labels.numpy())


def _score_on_main(protocol: EvaluationProtocol[Figures], store: AnswerStore) -> Figures:
    """The figures from every rank's answers, on every rank."""
    gathered = store.gathered()
    figures = None
    if distributed.is_main():
        figures = protocol.score(_noting_progress(gathered))
    for _ in gathered:  # the other ranks hand over theirs; on main only what `score` has left
        pass
    return distributed.broadcast_object(figures)  # type: ignore[return-value]


def _noting_progress(answers: Iterator[ImageAnswer]) -> Iterator[ImageAnswer]:
    for answer in answers:
        distributed.note_progress()
        yield answer


def _load(questions: Sequence[Question], options: EvaluationOptions, device: torch.device) -> Iterator[ResizedImage]:
    workers = min(options.workers, len(questions))
    loader = DataLoader(
        _Images(questions, options.scale),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=devices.loader_context(device, workers, __name__),
        generator=torch.Generator().manual_seed(0),  # else torch's global generator would be drawn from
        worker_init_fn=end_with_a_lost_batch,
    )
    for loaded in batches(loader):
        if isinstance(loaded, str):
            raise ValueError(loaded)
        yield loaded


class _Images(Dataset[ResizedImage | str]):
    """Decoded and resized images; a message where that fails, as errors cross processes with a page of text."""

    def __init__(self, questions: Sequence[Question], scale: tuple[int, int]):
        self.files = [(question.image, question.where) for question in questions]
        self.scale = scale

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> ResizedImage | str:
        file, where = self.files[number]
        try:
            image = open_image(file.path)
            if file.size is not None and image.size != file.size:
                found, annotated = (f"{width}x{height}" for width, height in (image.size, file.size))
                raise ValueError(f"{file.path}: {found} pixels, annotated as {annotated}: its boxes do not fit")
        except ValueError as error:
            return f"{error}, {where}" if where else str(error)
        return resize_for_inference(image, self.scale)
