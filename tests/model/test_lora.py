"""Adapters change nothing at first, are all that is trained, and give what the merged weights give."""

import pytest
import torch
from golden_cases import load_case, recorded_noise, tiny_model, training_batch
from torch import Tensor

from groundingdino.model import GroundingDINO
from groundingdino.model.lora import PARTS, adapter_state, add_adapters, base_state, merged_state

pytestmark = pytest.mark.usefixtures("each_path")
RANK = 4
TOLERANCE = 1e-6  # of the largest logit or box; a parametrized feed-forward runs layer by layer, a plain one fused


def predictions(model: GroundingDINO) -> list[Tensor]:
    """Boxes and finite logits of all layers for a golden batch, with denoising."""
    case, golden = load_case("train", "mixed_batch")
    images, text, targets = training_batch(case, golden)
    output = model(images, text, targets, recorded_noise(golden, targets))
    found = (*output.layers, output.proposals, *output.denoising.layers)
    return [tensor for p in found for tensor in (p.boxes, p.logits.masked_fill(p.logits.isinf(), 0.0))]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a share of its tensor's largest value."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def adapted(*parts: str) -> GroundingDINO:
    """The tiny model with adapters that do something."""
    torch.manual_seed(0)
    model = tiny_model()
    add_adapters(model, RANK, parts or PARTS)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(".0.b"):
                tensor.normal_(std=0.02)
    return model


def test_a_new_adapter_changes_nothing_and_every_b_of_it_gets_a_gradient():
    expected = predictions(tiny_model())
    model = tiny_model()
    add_adapters(model, RANK, PARTS)
    found = predictions(model)
    assert distance(found, expected) < TOLERANCE
    sum(x.square().sum() for x in found).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name, _ in model.named_parameters() if name.endswith((".0.a", ".0.b"))}
    assert not [name for name, p in trained.items() if p.grad is None]
    assert not [name for name, p in trained.items() if name.endswith(".0.b") and not p.grad.any()]


def test_the_merged_model_computes_the_same():
    model = adapted()
    plain = tiny_model()
    before = predictions(plain)
    plain.load_state_dict(merged_state(model))
    merged = predictions(plain)
    assert distance(predictions(model), merged) < TOLERANCE
    assert distance(merged, before) > 0.01
    original = tiny_model().state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in base_state(model.state_dict()).items())


def test_queries_keys_and_values_each_have_a_rank_of_their_own_and_only_the_chosen_parts_are_adapted():
    model = adapted("decoder")
    name = "decoder.layers.0.self_attention.in_proj_weight"
    change = merged_state(model)[name] - base_state(model.state_dict())[name]
    assert [torch.linalg.matrix_rank(part, tol=1e-4).item() for part in change.chunk(3)] == [RANK] * 3
    assert torch.linalg.matrix_rank(change, tol=1e-4).item() == 3 * RANK
    assert all(name.startswith("decoder.") for name in adapter_state(model))
    with pytest.raises(ValueError, match="adapters have a rank from 1 and are of backbone"):
        add_adapters(tiny_model(), RANK, ["neck"])
