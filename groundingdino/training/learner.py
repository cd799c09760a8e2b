"""The training step: losses, gradients, optimizer. It reads nothing from the device but for matching."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from groundingdino.config import TrainConfig
from groundingdino.data.batch import Batch
from groundingdino.model import GroundingDINO
from groundingdino.model.denoising import DenoisingNoise, num_groups
from groundingdino.runtime import devices, distributed, threads
from groundingdino.structures import ImageBatch, Targets, TextBatch, to_device
from groundingdino.training import optimizer as optim
from groundingdino.training.criterion import Criterion, Normalizers
from groundingdino.training.ema import MovingAverage
from groundingdino.training.resume import TrainingState, check_fits
from groundingdino.training.step_clock import StepClock

ADAMW_STATE = {"step", "exp_avg", "exp_avg_sq"}
SCALER_STATE = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


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
    """Everything that a training step changes: weights, optimizer, loss scale, moving average.

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
        self.clock = StepClock(device)
        self.training_step: TrainingStep | DistributedDataParallel = TrainingStep(model, criterion, config.precision)
        if distributed.world_size() > 1:
            # Every parameter takes part in every step (also without any object), so nothing has to be searched for.
            self.training_step = DistributedDataParallel(
                self.training_step,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                bucket_cap_mb=config.bucket_mib,
            )
            self.training_step.register_comm_hook(None, self._exchange)
        self.average = MovingAverage(model, config.ema_decay) if config.ema_decay > 0 else None

    def step(
        self, batches: Sequence[Batch], factor: float, noise: Sequence[DenoisingNoise] | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step. It changes nothing where the gradient is not finite.

        Args:
            batches: micro-batches of this process.
            factor: on the base learning rate.
            noise: denoising draws of each micro-batch instead of fresh ones (tests).

        Returns:
            The loss terms, averaged over the micro-batches, and the gradient norm before clipping, on the device.
        """
        threads.adjust()
        optim.train_mode(self.model, self.config.freeze)
        optim.set_lr(self.optimizer, self.lr * factor)
        self.clock.start()

        # Gradients of all micro-batches, exchanged between processes with the last one
        draws: Sequence[DenoisingNoise | None] = noise if noise is not None else [None] * len(batches)
        normalizers = self._normalizers(batches, draws) if len(batches) > 1 else None
        terms = [
            self._backward((batch, drawn), normalizers, share=1 / len(batches), exchange=index == len(batches) - 1)
            for index, (batch, drawn) in enumerate(zip(batches, draws, strict=True))
        ]

        # The step, left out on the device where the norm is not finite
        self.scaler.unscale_(self.optimizer)
        norm = optim.clip_gradients(self.optimizer, self.config.optimizer.clip_norm)
        optim.finite_step(self.optimizer, self.scaler, norm)
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model, norm.isfinite())
        self.clock.mark("optimizer")
        if len(terms) == 1:
            return terms[0], norm
        return {name: torch.stack([part[name] for part in terms]).mean(dim=0) for name in terms[0]}, norm

    def _exchange(self, state: object, bucket: GradBucket) -> Future[Tensor]:
        """Average a bucket's gradients over the processes; called when the last of them has been computed."""
        self.clock.mark("backward")
        hook = bf16_compress_hook if self.config.exchange_precision == "bf16" else allreduce_hook
        return hook(None, bucket)  # type: ignore[arg-type]

    def _normalizers(self, batches: Sequence[Batch], draws: Sequence[DenoisingNoise | None]) -> Normalizers:
        """What the criterion divides by: the objects of all micro-batches together."""
        sizes = self.model.config
        targets = [_targets(batch) for batch in batches]
        groups = [
            num_groups(t.counts, sizes.num_denoising) if drawn is None else drawn.label_draw.shape[1]
            for t, drawn in zip(targets, draws, strict=True)
        ]
        return self.criterion.normalizers(targets, sizes.num_queries, groups)

    def _backward(
        self, drawn: tuple[Batch, DenoisingNoise | None], normalizers: Normalizers | None, share: float, exchange: bool
    ) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch times `share`; its loss terms, detached."""
        batch, noise = drawn
        parts = (batch.images, batch.text, _targets(batch))
        images, text, targets = (to_device(part, self.device) for part in parts)
        step = self.training_step
        unshared = step.no_sync() if isinstance(step, DistributedDataParallel) and not exchange else None
        with unshared or contextlib.nullcontext():
            terms = step(images, text, targets, normalizers, noise)
            self.clock.mark("forward")
            self.scaler.scale(terms["loss"] * share).backward()
            exchanged = isinstance(step, DistributedDataParallel) and exchange
            self.clock.mark("exchange" if exchanged else "backward")  # what was not hidden behind the computation
        return {name: value.detach() for name, value in terms.items()}

    def size(self) -> str:
        """How much is trained, and what that takes without activations, as a line for the log."""
        total = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        memory = 4 * (total + trained * len(("gradient", *ADAMW_STATE - {"step"})) + total * (self.average is not None))
        adapters = f" in adapters of rank {self.config.lora}" if self.config.lora else ""
        return (
            f"trained: {trained / 1e6:.2f} M of {total / 1e6:.2f} M parameters{adapters}; weights, gradients and "
            f"optimizer take {memory / 1e6:,.0f} MB"
        )

    def for_evaluation(self) -> GroundingDINO:
        """The model in evaluation mode: the averaged one where an average is kept. The next step trains on."""
        return self.model.eval() if self.average is None else self.average.model

    def state(self) -> dict[str, Any]:
        """Weights, optimizer, loss scale and average: those fields of a `resume.TrainingState`."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": {names[parameter]: dict(values) for parameter, values in self.optimizer.state.items()},
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state(),
        }

    def load_state(self, state: TrainingState) -> None:
        """The inverse of `state`; learning rate, weight decay, betas and groups remain those of the config.

        ValueError for a state of another model; nothing has been changed then.
        """
        self._check(state)
        self.model.load_state_dict(state.model)
        optimizer = self.optimizer.state_dict()
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        order = [names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]
        optimizer["state"] = {index: state.optimizer[name] for index, name in enumerate(order) if state.optimizer}
        self.optimizer.load_state_dict(optimizer)
        if state.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(state.scaler)
        if self.average is not None:
            self.average.load_state(state.average or {})

    def _check(self, state: TrainingState) -> None:
        """ValueError where the tensors of `state` do not fit this model and optimizer."""
        parameters = dict(self.model.named_parameters())
        weights = {name: tuple(t.shape) for name, t in self.model.state_dict().items()}
        trained = {name: weights[name] for name, p in parameters.items() if p.requires_grad}
        parts = [("model", state.model, weights)]
        if state.optimizer:
            fields = {name for values in state.optimizer.values() for name in values} | ADAMW_STATE
            for field in sorted(fields):
                found = {name: values[field] for name, values in state.optimizer.items() if field in values}
                shapes = dict.fromkeys(trained, ()) if field == "step" else trained
                parts.append((f"optimizer's {field}", found, shapes if field in ADAMW_STATE else {}))
        if state.config.get("precision") == "fp16" or state.scaler:
            missing = SCALER_STATE - state.scaler.keys()
            if missing:
                raise ValueError(f"cannot resume: the state of the loss scale lacks {', '.join(sorted(missing))}")
        if (self.average is None) != (state.average is None):
            raise ValueError("cannot resume: --ema-decay is on in only one of this run and the saved one: keep it")
        if state.average is not None:
            shapes = {name: tuple(p.shape) for name, p in parameters.items()}
            parts.append(("moving average", state.average, {**shapes, "steps": ()}))
        for part, tensors, expected in parts:
            check_fits(part, tensors, expected)


def to_float32(record: Any) -> Any:
    """A copy of nested records, tuples and lists with every half-precision tensor in float32."""
    if isinstance(record, Tensor):
        return record.float() if record.dtype in (torch.float16, torch.bfloat16) else record
    if is_dataclass(record) and not isinstance(record, type):
        return replace(record, **{f.name: to_float32(getattr(record, f.name)) for f in fields(record)})
    if isinstance(record, (tuple, list)):
        return type(record)(to_float32(item) for item in record)
    return record


class TrainingStep(nn.Module):
    """Model and criterion as one module, so that one wrapper for many processes sees one forward pass.

    The model runs in `precision`, matching and losses in float32.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module, precision: str) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.precision = precision

    def forward(
        self,
        images: ImageBatch,
        text: TextBatch,
        targets: Targets,
        normalizers: Normalizers | None = None,
        noise: DenoisingNoise | None = None,
    ) -> dict[str, Tensor]:
        """Every weighted loss term, and `loss`, their sum, as scalars.

        `normalizers` replaces this batch's own (see `Criterion`), `noise` the denoising draws (tests).
        """
        device = images.pixels.device

        # The detector, in half precision where asked for
        with devices.autocast(device, self.precision):
            output = self.model(images, text, targets, noise)

        # Matching and losses
        with torch.autocast(device.type, enabled=False):
            terms = self.criterion(to_float32(output), targets, normalizers)
        total = torch.stack(list(terms.values())).sum()
        return {"loss": poison(total), **terms}


def poison(loss: Tensor) -> Tensor:
    """`loss`; where it is not finite, every gradient that it gives is NaN.

    Without this an operation such as `clamp` could turn a NaN loss into plausible gradients. With it the gradient norm,
    which is the same on every process after the exchange of gradients, tells all of them at once to leave out the step.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
