"""Linear layers: oneDNN's fused product on CPUs, torch's own elsewhere."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["none", "relu", "gelu"]
MANY_ROWS = 256  # from which on copying the weight costs little
_ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "none") -> Tensor:
    """`F.linear` and the activation behind it; "gelu" is the exact one, by the error function.

    Where nothing needs a gradient, a float32 product on an x86 CPU is oneDNN's: it adds the bias and applies the
    activation while a result is in the registers (torch's product first copies the bias into the output, and the
    activation is another pass over it), and with AVX-512 its products are faster, too.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        activation: none, relu or gelu.

    Returns:
        (..., out).
    """
    if _by_onednn(x, weight):
        if weight.shape[0] <= weight.shape[1] and x.numel() >= MANY_ROWS * x.shape[-1]:
            weight = weight.T.contiguous().T  # the order in memory in which narrow products are a quarter faster
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return _ACTIVATIONS[activation](F.linear(x, weight, bias))


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()  # builds for x86 only; elsewhere oneDNN's float32 has not been measured
    )


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor, activation: Activation = "none") -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias, activation)
