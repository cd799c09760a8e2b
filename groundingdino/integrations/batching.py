"""Requests that come one by one, answered together.

While the model is busy, what arrives waits; then as many as fit run in one batch. So nobody waits for company, and the
busier the server, the larger its batches.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from groundingdino.inference.engine import TOP_K_PER_CAPTION
from groundingdino.inference.predictor import DetectionFilter, Predictor, filter_detections
from groundingdino.inference.prompts import ResolvedPrompt
from groundingdino.inputs.images import ResizedImage
from groundingdino.structures import Detections

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """One image, opened and resized, and what to find in it."""

    image: ResizedImage
    prompt: ResolvedPrompt
    keep: DetectionFilter


@dataclass(frozen=True, eq=False)
class _Waiting:
    question: Question
    answer: asyncio.Future[Detections]
    is_gone: Callable[[], Awaitable[bool]]  # whether nobody waits any more


class Batcher:
    """Answers questions in the order of their arrival, up to `largest` together.

    Args:
        predictor: answers them, in a thread, one batch at a time.
        largest: questions in a batch.
        note: is told the size of every batch.
    """

    def __init__(self, predictor: Predictor, largest: int, note: Callable[[int], object]) -> None:
        self._predictor, self._largest, self._note = predictor, largest, note
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue()

    def __len__(self) -> int:
        return self._waiting.qsize()

    async def answer(self, question: Question, is_gone: Callable[[], Awaitable[bool]]) -> Detections:
        """What was found. Raises what the predictor raised for it; ConnectionError where nobody waits any more."""
        waiting = _Waiting(question, asyncio.get_running_loop().create_future(), is_gone)
        await self._waiting.put(waiting)
        return await waiting.answer

    async def run(self) -> None:
        """Answer until cancelled."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self._largest and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            for one in batch:
                if not one.answer.done() and await one.is_gone():
                    one.answer.set_exception(ConnectionError("nobody waits for the answer any more"))
            batch = [one for one in batch if not one.answer.done()]
            if batch:
                self._note(len(batch))
                await self._answer(batch)

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        try:
            found = await asyncio.to_thread(answer_together, self._predictor, [one.question for one in batch])
        except Exception as error:  # whatever it is, it may be the fault of one of them, such as memory for a large one
            if len(batch) > 1:
                logger.warning("a batch of %d failed (%s); its questions run alone", len(batch), error)
                for one in batch:
                    await self._answer([one])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for one, detections in zip(batch, found, strict=True):
            if not one.answer.done():  # it may have been given up meanwhile
                one.answer.set_result(detections)


def answer_together(predictor: Predictor, questions: Sequence[Question]) -> list[Detections]:
    """One `Detections` for each question; the images run as one batch, padded to the largest."""
    engine = predictor.engine
    images = engine.encode_images([question.image for question in questions])
    prompts = engine.encode_prompts([question.prompt for question in questions])
    most = max(TOP_K_PER_CAPTION, *(question.keep.top_k or 0 for question in questions))
    ranked = engine.rank(zip(images, prompts, strict=True), most)
    return [filter_detections(boxes, q.prompt, q.keep) for boxes, q in zip(ranked, questions, strict=True)]
