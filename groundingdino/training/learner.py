"""What changes in training, and one optimizer step of it, which reads nothing from the device but for matching."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from groundingdino.checkpoints import model_file
from groundingdino.config import TrainConfig
from groundingdino.data.batch import Batch
from groundingdino.model import GroundingDINO
from groundingdino.model.denoising import num_groups
from groundingdino.runtime import devices, distributed
from groundingdino.structures import Targets, to_device
from groundingdino.training import optimizer as optim
from groundingdino.training.criterion import Criterion
from groundingdino.training.ema import MovingAverage
from groundingdino.training.step import TrainingStep


def group_batches(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Up to `size` micro-batches at a time; the last group of an epoch may be smaller."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _targets(batch: Batch) -> Targets:
    assert batch.targets is not None, "a batch of the training loader has targets"
    return batch.targets


class Learner:
    """What changes in training: weights, optimizer, loss scale, moving average. Takes optimizer steps.

    With k micro-batches in a step, losses are normalised by the objects of all k (and of all processes), which are
    counted beforehand, and the k gradients are averaged: the gradient of one batch of k times the size. mmengine
    normalises each micro-batch by its own objects, which gives an object in a nearly empty one more weight.
    """

    def __init__(self, model: GroundingDINO, criterion: Criterion, config: TrainConfig, device: torch.device) -> None:
        self.model = model.to(device)
        self.criterion = criterion
        optim.freeze(model, config.freeze)
        self.config = config
        self.device = device
        self.images_per_step = config.data.batch_size * config.accumulation_steps * distributed.world_size()
        self.lr = optim.scaled_lr(config.optimizer, self.images_per_step)
        self.optimizer = optim.build_optimizer(model, config.optimizer, self.lr)
        self.scaler = devices.grad_scaler(device, config.precision)
        self.training_step: TrainingStep | DistributedDataParallel = TrainingStep(model, criterion, config.precision)
        if distributed.world_size() > 1:
            # Every parameter takes part in every step (also without any object), so nothing has to be searched for.
            self.training_step = DistributedDataParallel(
                self.training_step, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.average = MovingAverage(model, config.ema_decay) if config.ema_decay > 0 else None

    def step(self, batches: Sequence[Batch], factor: float) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step with the base learning rate times `factor`. Does nothing where the gradient is not finite.

        Returns the loss terms, averaged over micro-batches, and the gradient norm before clipping, on the device.
        """
        optim.train_mode(self.model, self.config.freeze)
        optim.set_lr(self.optimizer, self.lr * factor)
        sums: dict[str, Tensor] = {}
        normalizers = self._normalizers(batches)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            terms = self._backward(batch, normalizers, share=1 / len(batches), exchange=last)
            for name, value in terms.items():
                sums[name] = sums[name] + value if name in sums else value
        self.scaler.unscale_(self.optimizer)
        norm = optim.clip_gradients(self.optimizer, self.config.optimizer.clip_norm)
        optim.finite_step(self.optimizer, self.scaler, norm)
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        if len(batches) > 1:
            sums = {name: value / len(batches) for name, value in sums.items()}
        return sums, norm

    def _normalizers(self, batches: Sequence[Batch]) -> Tensor | None:
        """Of all micro-batches together; None where there is one, whose own the criterion finds."""
        if len(batches) == 1:
            return None
        sizes = self.model.config
        targets = [to_device(_targets(batch), self.device, non_blocking=True) for batch in batches]
        groups = [num_groups(t.counts, sizes.num_denoising) for t in targets]
        return self.criterion.normalizers(targets, sizes.num_queries, groups)

    def _backward(self, batch: Batch, normalizers: Tensor | None, share: float, exchange: bool) -> dict[str, Tensor]:
        parts = (batch.images, batch.text, _targets(batch))
        images, text, targets = (to_device(part, self.device, non_blocking=True) for part in parts)
        step = self.training_step
        unshared = step.no_sync() if isinstance(step, DistributedDataParallel) and not exchange else None
        with unshared or contextlib.nullcontext():
            terms = step(images, text, targets, normalizers)
            self.scaler.scale(terms["loss"] * share).backward()
        return {name: value.detach() for name, value in terms.items()}

    @contextlib.contextmanager
    def for_evaluation(self) -> Iterator[GroundingDINO]:
        """The model in evaluation mode, with the averaged weights where they are kept."""
        self.model.eval()
        with self.average.applied() if self.average is not None else contextlib.nullcontext():
            yield self.model

    def state(self) -> dict[str, Any]:
        """Everything that a step changes, for `model_file.save_state`."""
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`. ValueError for the state of another model or of other groups of parameters."""
        problem = model_file.compare_shapes(
            {name: tuple(t.shape) for name, t in state["model"].items()},
            {name: tuple(t.shape) for name, t in self.model.state_dict().items()},
        )
        if problem:
            raise ValueError(f"cannot resume: the state belongs to another model: {problem}")
        if (self.average is None) != (state["average"] is None):
            raise ValueError("cannot resume: --ema-decay is on in only one of this run and the saved one")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state(state["average"])
