"""The optimizer, its groups, clipping, schedule and moving average."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from golden_cases import DECODER_LAYERS, load_case, recorded_noise, tiny_model, training_batch
from torch import nn

from groundingdino.checkpoints.formats.mmdet import native_name, to_native
from groundingdino.config import OptimizerConfig, ScheduleConfig
from groundingdino.runtime import devices
from groundingdino.training import optimizer as optim
from groundingdino.training.criterion import Criterion
from groundingdino.training.ema import MovingAverage
from groundingdino.training.learner import TrainingStep

CPU = torch.device("cpu")
YES = torch.tensor(True)
TOLERANCE = 1e-6  # float32, a handful of operations
TRAJECTORY_TOLERANCE = 1e-4  # relative
# Share of the way from the start. Adam divides by the gradient's size, so an entry whose gradient is rounding noise
# may move either way; measured 2.5 %.
MOVEMENT_TOLERANCE = 0.05


class Toy(nn.Module):
    """A model with the parts that the recipe's multipliers name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(3, 4)
        self.text_encoder = nn.ModuleDict({"layers": nn.Linear(3, 4), "projection": nn.Linear(4, 4)})
        self.decoder = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        text = self.text_encoder["projection"](self.text_encoder["layers"](x))
        return self.decoder(self.backbone(x) * text)


def backward(model: Toy, scale: float = 1.0) -> None:
    x = torch.linspace(-1, 1, 15).view(5, 3)
    (model(x).square().mean() * scale).backward()


def test_longest_part_of_a_name_decides_its_multiplier() -> None:
    keys = {"backbone": 0.1, "text_encoder": 0.1, "text_encoder.projection": 1.0}
    assert optim.lr_multiplier("text_encoder.layers.0.attention.in_proj_weight", keys) == 0.1
    assert optim.lr_multiplier("text_encoder.projection.bias", keys) == 1.0
    assert optim.lr_multiplier("language_model.language_backbone.body.weight", keys) == 0.1  # a part, not a prefix
    assert optim.lr_multiplier("decoder.layers.0.weight", keys) == 1.0


def test_learning_rate_scales_linearly_with_the_batch_and_can_be_fixed() -> None:
    config = OptimizerConfig()
    assert optim.scaled_lr(config, 32) == pytest.approx(2e-4)
    assert optim.scaled_lr(config, 8 * 2) == pytest.approx(1e-4)
    assert optim.scaled_lr(dataclasses.replace(config, scale_lr=False), 16) == pytest.approx(2e-4)


def test_groups_hold_every_parameter_once_with_its_rate_and_decay() -> None:
    model = Toy()
    optimizer = optim.build_optimizer(model, OptimizerConfig(), lr=1e-3)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    assert found[id(model.backbone.weight)] == found[id(model.text_encoder["layers"].bias)]
    assert found[id(model.backbone.weight)] == pytest.approx((1e-4, 1e-4))
    assert found[id(model.text_encoder["projection"].weight)] == pytest.approx((1e-3, 1e-4))
    optim.set_lr(optimizer, 1e-2)
    rates = sorted(g["lr"] for g in optimizer.param_groups)
    assert rates == pytest.approx([1e-3, 1e-2])


def test_a_multiplier_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="'backbon_e' is part of no parameter's name"):
        optim.build_optimizer(Toy(), OptimizerConfig(lr_multipliers=(("backbon_e", 0.1),)), lr=1e-3)


def test_frozen_parts_get_no_update_and_stay_in_evaluation_mode() -> None:
    model = Toy()
    optim.freeze(model, ("text_encoder",))
    optimizer = optim.build_optimizer(model, OptimizerConfig(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optim.train_mode(model, ("text_encoder",))
    assert model.training and not model.text_encoder["layers"].training
    backward(model)
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if not name.startswith("text_encoder")}
    with pytest.raises(ValueError, match="cannot freeze 'head'"):
        optim.freeze(model, ("head",))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_clipping_equals_torchs_and_returns_the_norm_before(scale: float) -> None:
    ours, theirs = Toy(), Toy()
    for model in (ours, theirs):
        backward(model, scale)
    norm = optim.clip_gradients(optim.build_optimizer(ours, OptimizerConfig(), 1e-3), 0.1)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
    torch.testing.assert_close(norm, expected, rtol=TOLERANCE, atol=0)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=TOLERANCE, atol=1e-12)


def test_zero_clip_norm_leaves_the_gradients_alone() -> None:
    model = Toy()
    backward(model, 1e3)
    before = [p.grad.clone() for p in model.parameters()]
    optim.clip_gradients(optim.build_optimizer(model, OptimizerConfig(), 1e-3), 0.0)
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_with_a_gradient_that_is_not_finite_changes_neither_weights_nor_optimizer(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "fused_adamw", lambda device: {"fused": fused})
    model, reference = Toy(), Toy()
    scaler = devices.grad_scaler(CPU, "fp32")
    states = []
    for network, scales in ((model, (1.0, math.nan, 2.0)), (reference, (1.0, 2.0))):
        optimizer = optim.build_optimizer(network, OptimizerConfig(), lr=1e-2)
        for scale in scales:
            backward(network, scale)
            optim.finite_step(optimizer, scaler, optim.clip_gradients(optimizer, 0.1))
            optimizer.zero_grad()
        states.append([s for state in optimizer.state_dict()["state"].values() for s in state.values()])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_fp16_scaler_leaves_out_an_overflown_step_and_halves_its_scale() -> None:
    model = Toy()
    optimizer = optim.build_optimizer(model, OptimizerConfig(), lr=1e-2)
    scaler = devices.grad_scaler(CPU, "fp16")
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(torch.zeros(()))  # makes the scale tensor
    backward(model, math.inf)
    scaler.unscale_(optimizer)
    optim.finite_step(optimizer, scaler, optim.clip_gradients(optimizer, 0.1))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**15


def test_steps_schedule_is_torchs_multi_step_by_epoch() -> None:
    config = ScheduleConfig(milestones=(3,), gamma=0.1)
    factors = [optim.lr_factor(config, step, steps_per_epoch=7, epochs=5) for step in range(35)]
    assert factors == pytest.approx([1.0] * 21 + [0.1] * 14)


def test_warm_up_is_linear_and_cosine_ends_at_its_final_factor() -> None:
    config = ScheduleConfig(kind="cosine", warmup_steps=10, warmup_start=0.1, final=0.05)
    factors = [optim.lr_factor(config, step, steps_per_epoch=50, epochs=2) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert all(a < b for a, b in zip(factors[:10], factors[1:11], strict=True))
    assert all(a > b for a, b in zip(factors[10:100], factors[11:], strict=True))
    assert factors[100] == pytest.approx(0.05)
    assert factors[50] == pytest.approx(0.05 + 0.95 * 0.5)


def test_moving_average_follows_its_formula_leaves_out_steps_that_were_and_survives_saving() -> None:
    model = Toy()
    average = MovingAverage(model, decay=0.9)
    expected = model.decoder.weight.detach().clone()
    for step in range(1, 41):
        with torch.no_grad():
            model.decoder.weight.add_(0.1)
        average.update(model, YES)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.decoder.weight.detach()
        average.update(model, ~YES)  # a step that was left out
    torch.testing.assert_close(average.model.decoder.weight, expected, rtol=1e-5, atol=1e-6)

    other = MovingAverage(Toy(), decay=0.9)
    other.load_state({name: value.clone() for name, value in average.state().items()})
    assert other.steps == 40
    assert all(torch.equal(value, other.state()[name]) for name, value in average.state().items())
    with pytest.raises(ValueError, match="another model"):
        MovingAverage(nn.Linear(2, 2), 0.9).load_state(average.state())
    with pytest.raises(ValueError, match="between 0 and 1"):
        MovingAverage(model, 1.0)


def test_the_averaged_model_of_one_in_training_is_ready_for_evaluation() -> None:
    model = Toy().train()
    average = MovingAverage(model, decay=0.9).model
    assert model.training and not any(module.training for module in average.modules())
    assert not any(parameter.requires_grad for parameter in average.parameters())


def test_every_parameter_has_mmdets_learning_rate_and_weight_decay(golden: Path) -> None:
    theirs = json.loads((golden / "tiny/optimizer_groups.json").read_text())
    model = tiny_model()
    config = OptimizerConfig()
    optimizer = optim.build_optimizer(model, config, optim.scaled_lr(config, 32))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    expected = {native_name(name, DECODER_LAYERS): (v["lr"], v["weight_decay"]) for name, v in theirs.items()}
    assert None not in expected
    assert ours.keys() == expected.keys()
    for name, values in expected.items():
        assert ours[name] == pytest.approx(values, rel=1e-9), name


def test_five_steps_follow_mmdets_trajectory() -> None:
    case, golden = load_case("train", "trajectory")
    images, text, targets = training_batch(case, golden)
    model = tiny_model().train()
    config = OptimizerConfig(lr=case["lr"], weight_decay=case["weight_decay"], clip_norm=case["clip_max_norm"])
    optimizer = optim.build_optimizer(model, config, config.lr)
    scaler = devices.grad_scaler(CPU, "fp32")
    step_of = TrainingStep(model, Criterion(), "fp32")
    parameters = dict(model.named_parameters())
    start = {name: p.detach().clone() for name, p in parameters.items()}
    for step, loss in enumerate(case["losses"]):
        noise = recorded_noise(golden, targets, f"step{step}.")
        terms = step_of(images, text, targets, noise=noise)
        assert terms["loss"].item() == pytest.approx(loss, rel=TRAJECTORY_TOLERANCE)
        terms["loss"].backward()
        optim.finite_step(optimizer, scaler, optim.clip_gradients(optimizer, config.clip_norm))
        optimizer.zero_grad()
        prefix = f"step{step}.param."
        watched = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
        assert len(watched) == 8
        for name, theirs in to_native(watched, DECODER_LAYERS).items():
            difference = (parameters[name] - theirs).abs().max().item()
            assert difference < TRAJECTORY_TOLERANCE * theirs.abs().max().item(), name
            moved = (theirs - start[name]).abs().max().item()
            assert difference < MOVEMENT_TOLERANCE * moved, name  # the weights have hardly moved: the stronger bound
