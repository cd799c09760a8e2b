"""Learn what stands for one name's tokens from a handful of boxes. The weights stay as they are.

Axes: T tokens of the name, D width, N objects, Q queries.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundingdino.boxes import xyxy_to_cxcywh
from groundingdino.inference.engine import EncodedImage
from groundingdino.inference.learned_prompt import LearnedPrompt
from groundingdino.inference.predictor import Predictor
from groundingdino.inference.prompts import CaptionChunk, Categories, resolve
from groundingdino.inputs.images import ImageLike, load_image, resize_for_inference
from groundingdino.inputs.text import collate_text
from groundingdino.structures import Targets, to_device
from groundingdino.training.criterion import WEIGHTS, Criterion, box_losses, focal_losses, stack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptLearning:
    """Steps, learning rate and seed, and the names beside the learned one."""

    steps: int = 200  # one image each
    lr: float = 0.05  # of Adam, times the root mean square of the plain name's features; falls to 0
    beside: Sequence[str] = ()  # other names in the caption, which the learned one will be asked for with
    seed: int = 0  # of the order of the images


def learn_prompt(
    images: Sequence[ImageLike],
    boxes: Sequence[Any],
    name: str,
    model: Predictor,
    settings: PromptLearning | None = None,
) -> LearnedPrompt:
    """Token features for `name` with which the model finds these boxes; `LearnedPrompt.save` writes them.

    The losses are those of training, but only the features of the name's tokens change. So every prompt without the
    learned one gets the answers that it got before.

    Args:
        images: paths, Pillow images, arrays or tensors; those without the object teach what it is not.
        boxes: for each image the (N, 4) boxes of all its objects of that name, xyxy in pixels; N may be 0.
        name: begins as itself; best a word for it that the model may know.
        model: in float32; it is left as it was.
    Raises:
        ValueError: images and boxes that do not fit together, no box at all, or a name that `Categories` refuses.
    """
    settings = settings or PromptLearning()
    targets_of = _checked(images, boxes)
    engine, network = model.engine, model.model
    resolved = resolve(Categories([name, *settings.beside]), model.tokenizer, network.config.max_tokens)
    if len(resolved.chunks) > 1:
        raise ValueError(f"{len(settings.beside)} names beside {name!r} do not fit into one caption: give fewer")
    chunk = resolved.chunks[0]

    # What does not change is computed once: the images' halves and the caption's features
    encoded: list[EncodedImage] = []
    targets: list[Targets] = []
    for image, own in zip(images, targets_of, strict=True):
        opened = load_image(image)
        encoded += engine.encode_images([resize_for_inference(opened, model.scale)])
        targets.append(to_device(_targets(own, opened.size, chunk), engine.device))
    assert chunk.positive_map is not None
    (prompt,) = engine.encode_prompts([resolved])
    text = to_device(collate_text([chunk.caption]), engine.device)
    features, places = prompt.features[0], chunk.positive_map[0].nonzero()[:, 0].to(engine.device)

    learned = features[places].clone().requires_grad_()
    rate = settings.lr * float(learned.detach().square().mean().sqrt())
    optimizer = torch.optim.Adam([learned], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    order = np.random.default_rng(settings.seed)
    for step in range(settings.steps):
        if step % len(images) == 0:
            shuffled = order.permutation(len(images))
        number = int(shuffled[step % len(images)])
        tokens = encoded[number].tokens.take([encoded[number].row])
        output = network.detect(tokens, features.index_put((places,), learned)[None], text)
        loss = _loss(stack((*output.layers, output.proposals)), targets[number])
        (learned.grad,) = torch.autograd.grad(loss, [learned])
        optimizer.step()
        schedule.step()
        logger.debug("step %d of %d: loss %.4f", step + 1, settings.steps, loss.item())
    return LearnedPrompt(name, learned.detach().float().cpu(), network.config.name)


def _loss(answers: tuple[Tensor, Tensor], targets: Targets) -> Tensor:
    """The criterion's terms for the matching queries, summed over the layers; there are no denoising queries."""
    wanted, matching = Criterion().matching_targets(*answers, targets)
    (focal,), (l1,), (giou,) = focal_losses([(answers[0], wanted)]), *box_losses([matching])
    terms = WEIGHTS["loss_cls"] * focal + WEIGHTS["loss_bbox"] * l1 + WEIGHTS["loss_iou"] * giou
    return terms.sum() / max(targets.counts[0], 1)


def _checked(images: Sequence[ImageLike], boxes: Sequence[Any]) -> list[Tensor]:
    """The boxes as (N, 4) tensors."""
    if len(images) != len(boxes):
        raise ValueError(f"{len(images)} images and boxes of {len(boxes)}: give one list of boxes for each image")
    tensors = [torch.as_tensor(own, dtype=torch.float32).reshape(-1, 4) for own in boxes]
    if not any(map(len, tensors)):
        raise ValueError("no box in any image: a prompt is learned from boxes")
    for number, own in enumerate(tensors):
        if not (torch.isfinite(own).all() and (own[:, 2:] > own[:, :2]).all()):
            raise ValueError(f"image {number}: boxes are xyxy in pixels, with x1 < x2 and y1 < y2, got {own.tolist()}")
    return tensors


def _targets(boxes: Tensor, size: tuple[int, int], chunk: CaptionChunk) -> Targets:
    """The objects of one image, all of the caption's first name."""
    assert chunk.positive_map is not None
    count = len(boxes)
    padded = torch.zeros(1, max(count, 1), 4)
    padded[0, :count] = xyxy_to_cxcywh(boxes / torch.tensor([*size, *size])).clamp(0, 1)
    named = torch.zeros(1, max(count, 1), chunk.positive_map.shape[1], dtype=torch.bool)
    named[0, :count] = chunk.positive_map[0]
    labels = torch.zeros(1, max(count, 1), dtype=torch.int64)
    return Targets(padded, named, labels, torch.arange(max(count, 1))[None] < count, (count,))
