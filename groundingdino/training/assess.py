"""Evaluation in the course of a training run: the figures of every split, and a few pictures."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from groundingdino import devices, text
from groundingdino.boxes import iou as box_iou
from groundingdino.config import TrainConfig
from groundingdino.data import Expression, load_expressions, transforms
from groundingdino.data.batch import collate_images
from groundingdino.distributed import World
from groundingdino.model import GroundingDINO
from groundingdino.postprocess import referring_scores, to_image_frame, top_detections
from groundingdino.structures import to_device
from groundingdino.training.pictures import draw_answer

Figures = dict[str, dict[str, float]]  # split -> figure -> value
DECIDING = "precision@1"


def deciding_figure(figures: Figures) -> float:
    """Precision@1 of the first split; decides which checkpoint is the best. -1 without any evaluation."""
    return next(iter(figures.values()))[DECIDING] if figures else -1.0


class Assessor:
    """Evaluates the splits of `config.data.evaluation` with the detector as it is."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        """ValueError for an annotation file that is missing or wrong: now, not after the first epoch."""
        data = config.data
        self._config, self._world = config, world
        self._images = data.root / data.evaluation_images
        self._scale = (data.evaluation_side, data.evaluation_long_side)
        self._splits = {split: load_expressions(data.root / file) for split, file in data.evaluation.items()}
        self._tokenizer = text.CaptionTokenizer()

    @torch.inference_mode()
    def figures(self, model: GroundingDINO) -> Figures:
        """Every split's figures, the same on every process."""
        return {split: self._split_figures(model, expressions) for split, expressions in self._splits.items()}

    def _split_figures(self, model: GroundingDINO, expressions: Sequence[Expression]) -> dict[str, float]:
        hits = 0
        for expression in expressions:
            _, best, _ = self._answer(model, expression)
            truth = torch.tensor(expression.box)
            hits += bool(box_iou(truth, best.cpu()) >= 0.5)
        return {DECIDING: hits / len(expressions)}

    @torch.inference_mode()
    def pictures(self, model: GroundingDINO, count: int) -> list[Image.Image]:
        """The model's best answers to `count` expressions of the first split, spread over it."""
        if not self._splits:
            return []
        expressions = next(iter(self._splits.values()))
        drawn = []
        for expression in spread(expressions, count):
            image, box, score = self._answer(model, expression)
            drawn.append(draw_answer(image, expression.caption, expression.box, box.tolist(), score))
        return drawn

    def _answer(self, model: GroundingDINO, expression: Expression) -> tuple[Image.Image, Tensor, float]:
        """The image, the best box (4,) xyxy in its pixels, the score."""
        image = transforms.open_image(self._images / expression.file_name)
        pixels, scale_factor = transforms.resize_for_test(image, self._scale)
        images = to_device(collate_images([pixels]), self._world.device)
        encoded = self._tokenizer.encode(text.finish_caption(expression.caption))
        words = to_device(text.collate_text([encoded], model.config.max_tokens), self._world.device)
        with devices.autocast(self._world.device, self._config.precision):
            answer = model(images, words).layers[-1]
        boxes, scores, _ = top_detections(referring_scores(answer.logits[0].float()), answer.boxes[0].float(), 1)
        return image, to_image_frame(boxes[0], images.sizes[0], scale_factor), scores[0].item()


def spread(items: Sequence[Expression], count: int) -> list[Expression]:
    """`count` items (all where there are fewer) at even distances."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]
