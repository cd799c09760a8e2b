"""How much memory and time a run will take, from two steps that change nothing."""

import logging
import resource
import time
from dataclasses import replace

import torch

from groundingdino.data import Batch, TrainLoader, collate
from groundingdino.data.batch import Sample
from groundingdino.data.sampler import Draw
from groundingdino.inputs.images import resize_for_training
from groundingdino.runtime import distributed
from groundingdino.structures import to_device
from groundingdino.training import optimizer as optim
from groundingdino.training.callback import Callback
from groundingdino.training.learner import Learner, TrainingStep
from groundingdino.training.random_state import kept_random_states

ASPECT = 4 / 3  # of the images that are tried
MOMENTS = 2  # of AdamW, for each trained parameter

logger = logging.getLogger(__name__)


class Estimate(Callback):
    """Logs what is trained, how much memory the largest batch needs, and how long the run will take."""

    def on_start(self, learner: Learner, loader: TrainLoader, steps: int) -> None:
        """Measure a forward and backward pass with the largest images, and one with images of the middle size."""
        if steps <= 0:
            return
        sides = sorted(learner.config.data.train_sides)
        with kept_random_states(learner.device):
            _trial(learner, batch_of_side(learner, loader, sides[-1]))
            seconds = _trial(learner, batch_of_side(learner, loader, sides[len(sides) // 2]))
        trained = sum(p.numel() * p.element_size() for p in learner.model.parameters() if p.requires_grad)
        memory = (_peak_memory(learner.device) + MOMENTS * trained) / 2**30
        duration = _duration(seconds * learner.config.accumulation_steps * steps)
        if distributed.is_main():
            for line in what_is_trained(learner):
                logger.info(line)
            logger.info(f"about {memory:.1f} GiB of memory per process; {seconds:.2f} s per batch")
            logger.info(f"about {duration} for {steps:,} steps, evaluation not counted")


def what_is_trained(learner: Learner) -> list[str]:
    """A line for each part of the model: parameters, and at which rate they are trained."""
    rate = {p: learner.lr * group["multiplier"] for group in learner.optimizer.param_groups for p in group["params"]}
    lines = []
    for name, part in learner.model.named_children():
        parameters = list(part.parameters())
        count = sum(p.numel() for p in parameters)
        rates = sorted({rate[p] for p in parameters if p in rate})
        how = f"trained at {' and '.join(f'{one:.2g}' for one in rates)}" if rates else "frozen"
        if count:
            lines.append(f"  {name:20}{count / 1e6:8.2f} M parameters, {how}")
    return lines


def batch_of_side(learner: Learner, loader: TrainLoader, side: int) -> Batch:
    """The first samples of the data set, resized to one size with a short side of `side` pixels."""
    data, dataset = learner.config.data, loader.dataset
    size = (min(round(side * ASPECT), data.train_long_side), side)
    samples = [dataset[Draw(number % len(dataset), 0, 0)] for number in range(data.batch_size)]
    return collate([_resized(sample, size) for sample in samples], dataset.limits.max_tokens)


def _resized(sample: Sample, size: tuple[int, int]) -> Sample:
    height, width = sample.image.shape[1:]
    scale = torch.tensor([size[0] / width, size[1] / height]).repeat(2)
    boxes = None if sample.boxes is None else sample.boxes * scale
    return replace(sample, image=resize_for_training(sample.image, size), boxes=boxes)


def _trial(learner: Learner, batch: Batch) -> float:
    """Seconds of a forward and backward pass; its gradients are thrown away."""
    assert batch.targets is not None
    step = TrainingStep(learner.model, learner.criterion, learner.config.precision)
    optim.train_mode(learner.model, learner.config.freeze)
    begin = time.perf_counter()
    images, text, targets = (to_device(p, learner.device) for p in (batch.images, batch.text, batch.targets))
    loss = step(images, text, targets)["loss"]
    loss.backward()
    loss.item()  # waits for the device
    seconds = time.perf_counter() - begin
    learner.optimizer.zero_grad(set_to_none=True)
    return seconds


def _peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak since its start; on a CPU this process's."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(torch.get_device_module(device).max_memory_allocated(device))


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
