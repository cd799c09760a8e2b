"""Deformable-attention calls for the tests of the NPU binding, with the truth in float64 from the composite."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from groundingdino.ops import ms_deform_attn_reference


@dataclass(frozen=True)
class Case:
    """Sizes of one call: B images, Q queries, M heads, C channels, P points."""

    shapes: tuple[tuple[int, int], ...] = ((5, 7), (3, 4))
    B: int = 2
    Q: int = 40
    M: int = 8
    C: int = 32
    P: int = 4
    spread: float = 1.2  # locations lie in 0.5 +- spread / 2

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """value, locations, weights and the gradient of the output, float32 on the CPU."""
        torch.manual_seed(1)
        tokens, levels = sum(h * w for h, w in self.shapes), len(self.shapes)
        value = torch.randn(self.B, tokens, self.M, self.C)
        locations = 0.5 + self.spread * (torch.rand(self.B, self.Q, self.M, levels, self.P, 2) - 0.5)
        weights = torch.rand(self.B, self.Q, self.M, levels, self.P)
        return value, locations, weights, torch.randn(self.B, self.Q, self.M * self.C)


BASE = Case()
CASES = {
    "the detector's sizes": BASE,
    "one query": replace(BASE, Q=1),
    "31 queries": replace(BASE, Q=31),
    "32 queries": replace(BASE, Q=32),
    "one point on the path without a kernel in CANN 8.5": replace(BASE, P=1),
    "one point and few queries": replace(BASE, P=1, Q=3, C=16),
    "three points": replace(BASE, P=3),
    "12 channels": replace(BASE, C=12),
    "one channel": replace(BASE, C=1),
    "33 channels, 5 queries, one point": replace(BASE, C=33, Q=5, P=1),
    "a level of one pixel": replace(BASE, shapes=((1, 1), (2, 3))),
    "five levels": replace(BASE, shapes=((6, 5), (4, 4), (3, 2), (2, 1), (1, 1)), Q=33),
    "sixteen heads": replace(BASE, M=16, C=8),
    "one head": replace(BASE, M=1),
    "locations far outside": replace(BASE, spread=40.0),
}


def truth(case: Case, value: Tensor, locations: Tensor, weights: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and the gradients of value, locations and weights by the composite in float64."""
    inputs = [t.detach().double().requires_grad_() for t in (value, locations, weights)]
    output = ms_deform_attn_reference(inputs[0], case.shapes, inputs[1], inputs[2])
    return [output.detach(), *torch.autograd.grad(output, inputs, grad.double())]
