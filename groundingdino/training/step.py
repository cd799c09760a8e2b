"""Model and criterion as one module, so that one wrapper for many processes sees one forward pass."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from groundingdino.model.denoising import DenoisingNoise
from groundingdino.runtime import devices
from groundingdino.structures import ImageBatch, Targets, TextBatch


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
    """Images, sentences and targets in, losses out. The model runs in `precision`, matching and losses in float32."""

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
        normalizers: Tensor | None = None,
        noise: DenoisingNoise | None = None,
    ) -> dict[str, Tensor]:
        """Every weighted loss term, and `loss`, their sum.

        `normalizers` replaces this batch's own (see `Criterion`), `noise` the denoising draws (tests).
        """
        device = images.pixels.device
        with devices.autocast(device, self.precision):
            output = self.model(images, text, targets, noise)
        with torch.autocast(device.type, enabled=False):
            terms = self.criterion(to_float32(output), targets, normalizers)
        total = torch.stack(list(terms.values())).sum()
        return {"loss": poison(total), **terms}


def poison(loss: Tensor) -> Tensor:
    """`loss` itself, but where it is not finite every gradient it gives is NaN.

    Without this an operation such as `clamp` could turn a NaN loss into plausible gradients. With it the gradient norm,
    which is the same on every process after the exchange of gradients, tells all of them at once to leave out the step.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
