"""Stochastic depth (Huang et al. 2016): in training, an image skips a residual branch now and then.

What is skipped is not computed either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from groundingdino.runtime import devices


@dataclass(frozen=True)
class DropPath:
    """The images of a batch that take one residual branch in this step."""

    count: int
    index: Tensor | None  # (count,) their numbers in the batch; None for all
    weight: float  # of the branch's result: 1 / the probability to be taken

    def take(self, x: Tensor) -> Tensor:
        """(B, ...) -> (count, ...)."""
        return x if self.index is None else x.index_select(0, self.index)

    def add(self, x: Tensor, change: Tensor) -> Tensor:
        """x (B, ...) with change (count, ...) added to the images that were taken."""
        if self.index is None:
            return torch.add(x, change, alpha=self.weight)
        return torch.index_add(x, 0, self.index, change.to(x.dtype), alpha=self.weight)


def sample_drop_path(probabilities: Sequence[float], batch: int, device: torch.device) -> list[DropPath]:
    """Which images take which branch; `probabilities` holds one per branch, to be taken.

    Drawn on the host, which has to know what to compute.
    """
    if all(probability == 1 for probability in probabilities):
        return [DropPath(batch, None, 1.0)] * len(probabilities)
    drawn = (torch.rand(len(probabilities), batch) < torch.tensor(probabilities)[:, None]).tolist()
    numbers = [[image for image, taken in enumerate(images) if taken] for images in drawn]
    indices = devices.send(torch.tensor(list(chain.from_iterable(numbers)), dtype=torch.int64), device)
    return [
        DropPath(len(index), None if len(index) == batch else index, 1 / probability)
        for index, probability in zip(indices.split([len(n) for n in numbers]), probabilities, strict=True)
    ]


def residual_branch(
    x: Tensor, modules: Sequence[nn.Module], drop_path: DropPath, recompute: bool, *inputs: Any
) -> Tensor:
    """x (B, ...) + branch(norm(x), *inputs) for the images that take the branch.

    Args:
        x: (B, ...).
        modules: norm and branch.
        drop_path: of this branch.
        recompute: whether the backward pass computes norm and branch again. The sum lies outside, so recomputation
            ends before the branch's last matmul, which no gradient inside needs.
        inputs: what the branch needs besides.
    """
    norm, branch = modules
    if not drop_path.count:
        return ZeroGradients.apply(x, *norm.parameters(), *branch.parameters())

    def change(x: Tensor) -> Tensor:
        return branch(norm(drop_path.take(x)), *inputs)

    return drop_path.add(x, checkpoint(change, x, use_reentrant=False) if recompute else change(x))


class ZeroGradients(torch.autograd.Function):
    """Returns x; gives a skipped branch's parameters zero (not None) gradients, so AdamW still applies weight decay."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        """x unchanged."""
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """The gradient of x as it comes."""
        return (grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors))
