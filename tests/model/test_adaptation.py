"""Every layer of the model can be adapted and observed: nothing reads weights past a parametrization or a hook.

Each parametrization and each hook multiplies by a scale of its own, which is 1. A scale that gets no gradient would be
one that the predictions do not depend on.
"""

from typing import Any

import pytest
import torch
from golden_cases import load_case, recorded_noise, tiny_model, training_batch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from groundingdino.model import GroundingDINO

pytestmark = pytest.mark.usefixtures("each_path")


class Scaled(nn.Module):
    """A parametrization, as an adapter's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, times one."""
        return weight * self.scale


def summary(model: GroundingDINO) -> Tensor:
    """A number that depends on all predictions, those of the denoising queries too."""
    case, golden = load_case("train", "mixed_batch")
    images, text, targets = training_batch(case, golden)
    output = model(images, text, targets, recorded_noise(golden, targets))
    predictions = (*output.layers, output.proposals, *output.denoising.layers)
    return sum(
        prediction.logits.sigmoid().square().sum() + prediction.boxes.square().sum() for prediction in predictions
    )


def without_effect(value: Tensor, scales: dict[str, Tensor]) -> list[str]:
    """The scales that the value does not depend on."""
    gradients = torch.autograd.grad(value, list(scales.values()), allow_unused=True)
    found = dict(zip(scales, gradients, strict=True))
    return [name for name, grad in found.items() if grad is None or not grad.isfinite() or grad == 0]


def test_a_parametrization_of_any_weight_matrix_takes_effect():
    model = tiny_model()
    expected = summary(model).item()
    scales = {}
    for prefix, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() >= 2:
                scaled = Scaled()
                parametrize.register_parametrization(module, name, scaled)
                scales[f"{prefix}.{name}"] = scaled.scale
    assert len(scales) > 100
    value = summary(model)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert not without_effect(value, scales)


def test_a_hook_on_any_module_that_owns_parameters_fires_and_its_output_is_used():
    model = tiny_model()
    scales, fired = {}, set()

    def hook(name: str, scale: Tensor) -> Any:
        def scaled(x: Tensor) -> Tensor:
            return x * torch.where(x.isfinite(), scale, 1.0)  # logits are -inf at text padding

        def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            fired.add(name)
            if isinstance(output, Tensor):
                return scaled(output)
            return tuple(scaled(x) for x in output) if isinstance(output, tuple) else None

        return replace

    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            scales[name] = torch.ones((), requires_grad=True)
            module.register_forward_hook(hook(name, scales[name]))
    value = summary(model)
    assert fired == scales.keys() and len(scales) > 150
    del scales[""]  # the model itself owns the level embedding; its output is a record
    assert not without_effect(value, scales)
