"""Exponential moving average of a model's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """`average = decay * average + (1 - decay) * weights` after each step, in float32, beside the model.

    Early on the decay is `(1 + steps) / (10 + steps)` where that is smaller, so that the start does not linger.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start at the model's weights. ValueError for a decay outside (0, 1)."""
        if not 0.0 < decay < 1.0:
            raise ValueError(f"ema_decay must lie between 0 and 1, got {decay}: try 0.999, or 0 to switch it off")
        self.decay = decay
        self.steps = 0
        self._model = model
        self._average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present weights."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        weights = [p.detach() for p in self._model.parameters()]
        torch._foreach_lerp_(list(self._average.values()), weights, 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights inside the `with`, and its own again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._model.named_parameters():
            kept = parameter.detach().clone()
            parameter.copy_(self._average[name])
            self._average[name].copy_(kept)

    def state(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name, and the number of steps taken."""
        return {**self._average, "steps": torch.tensor(self.steps)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`. ValueError for weights of another model."""
        if state.keys() - {"steps"} != self._average.keys():
            raise ValueError("the moving average in the checkpoint belongs to another model")
        self.steps = int(state["steps"])
        for name, average in self._average.items():
            average.copy_(state[name])
