"""Exponential moving average of a model's weights."""

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class MovingAverage(Generic[Model]):
    """`average = decay * average + (1 - decay) * weights` after each step, in float32, as a model of its own.

    Early on the decay is `(1 + steps) / (10 + steps)` where that is smaller, so that the start does not linger.
    `torch.optim.swa_utils.AveragedModel` is not used: it counts and averages a step that was left out, too, and
    whether one was is known on the device alone.
    """

    def __init__(self, model: Model, decay: float) -> None:
        """Start at the weights of `model`. ValueError for a decay outside (0, 1)."""
        if not 0.0 < decay < 1.0:
            raise ValueError(f"ema_decay must lie between 0 and 1, got {decay}: try 0.999, or 0 to switch it off")
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.steps = torch.zeros((), device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, model: nn.Module, taken: Tensor) -> None:
        """Average in the current weights of `model`, unless `taken`, a bool on the device, is False."""
        self.steps += taken
        weight = (9 / (10 + self.steps)).clamp(min=1 - self.decay) * taken  # 1 - decay
        averages: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(averages, [p.detach() for p in model.parameters()], [weight] * len(averages))  # type: ignore[list-item]

    def state(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name, and the number of steps taken."""
        return {**{name: p.detach() for name, p in self.model.named_parameters()}, "steps": self.steps}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`. ValueError for weights of another model."""
        averages = dict(self.model.named_parameters())
        if state.keys() != averages.keys() | {"steps"}:
            raise ValueError("the moving average in the checkpoint belongs to another model")
        self.steps.copy_(state["steps"])
        for name, average in averages.items():
            average.copy_(state[name])
