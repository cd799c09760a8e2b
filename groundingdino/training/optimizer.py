"""AdamW, its learning-rate groups, clipping and the schedule: mmdet's RefCOCO recipe by default.

No function here reads a value back from the device, but `finite_step` where a device leaves it no choice.
"""

import math

import torch
from torch import Tensor, nn

from groundingdino.config import OptimizerConfig, ScheduleConfig
from groundingdino.runtime import devices, tuning


def scaled_lr(config: OptimizerConfig, images_per_step: int) -> float:
    """The base learning rate for `images_per_step` (over all devices and micro-batches): linear scaling."""
    return config.lr * images_per_step / config.base_batch if config.scale_lr else config.lr


def lr_multiplier(name: str, multipliers: dict[str, float]) -> float:
    """The factor of a parameter: of all keys that are a part of its name the longest wins, 1.0 without any.

    The rule of mmengine's `DefaultOptimWrapperConstructor`. Keys of equal length: the alphabetically first.
    """
    for key in sorted(sorted(multipliers), key=len, reverse=True):
        if key in name:
            return multipliers[key]
    return 1.0


def freeze(model: nn.Module, parts: tuple[str, ...]) -> None:
    """Stop the training of the named parts: no gradients, and evaluation mode, so no drop path either.

    ValueError names a part that the model does not have. `train_mode` keeps them in evaluation mode.
    """
    for part in parts:
        _child(model, part).requires_grad_(False)


def train_mode(model: nn.Module, frozen: tuple[str, ...]) -> None:
    """Training mode for everything but the frozen parts."""
    model.train()
    for part in frozen:
        _child(model, part).eval()


def _child(model: nn.Module, part: str) -> nn.Module:
    try:
        return model.get_submodule(part)
    except AttributeError as error:
        parts = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"cannot freeze {part!r}: the model's parts are {parts}") from error


def build_optimizer(model: nn.Module, config: OptimizerConfig, lr: float) -> torch.optim.AdamW:
    """AdamW over the parameters of `model` that need a gradient, one group per learning-rate multiplier.

    `lr` is the base rate (see `scaled_lr`). Each group carries `multiplier`; `set_lr` reads it. Fused on the devices
    that have it. ValueError for a multiplier that matches no parameter.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    names = [name for name, _ in model.named_parameters()]
    multipliers = dict(config.lr_multipliers)
    for key in multipliers:
        if not any(key in name for name in names):
            raise ValueError(f"learning-rate multiplier {key!r} is part of no parameter's name, such as {names[0]!r}")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(lr_multiplier(name, multipliers), []).append(parameter)
    if not groups:
        raise ValueError("nothing to train: every parameter is frozen")
    device = next(model.parameters()).device
    return torch.optim.AdamW(
        [{"params": members, "multiplier": factor, "lr": lr * factor} for factor, members in groups.items()],
        lr=lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        **adamw_options(device),
    )


ADAMW = "adamw"  # the operation's name in the table of what was measured


def adamw_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments of AdamW: fused where the device has it, grouped where that was measured to be faster."""
    return {"foreach": True} if tuning.choice(device, ADAMW) == "foreach" else devices.fused_adamw(device)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["multiplier"]


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every gradient that the next step would use."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Scale all gradients together to at most `max_norm` (0 = leave them). The norm before, a scalar on the device."""
    found = gradients(optimizer)
    norm = torch.nn.utils.get_total_norm(found, foreach=True)
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # torch's clip_grad_norm_, which mmengine calls
        torch._foreach_mul_(found, scale)
    return norm


def lr_factor(config: ScheduleConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Factor on the base learning rate for the optimizer step number `step`, counted from 0 over the whole run.

    "steps" is mmengine's MultiStepLR by epoch; "cosine" falls from 1 to `final` over the run. The warm-up multiplies
    either: it is linear from `warmup_start` at step 0 to 1 at step `warmup_steps`.
    """
    warmup = 1.0
    if step < config.warmup_steps:
        warmup = config.warmup_start + (1.0 - config.warmup_start) * step / config.warmup_steps
    if config.kind == "cosine":
        progress = min(step / max(steps_per_epoch * epochs, 1), 1.0)
        return warmup * (config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * progress)))
    drops = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
    return warmup * config.gamma**drops


def finite_step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, norm: Tensor) -> None:
    """One optimizer step that changes nothing, not even the step counters, where `norm` is not finite.

    A fused optimizer decides on the device, but on an NPU. Any other needs the answer on the host: one read per step.
    `optimizer` must have been unscaled by `scaler` already.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)  # has found the same by itself in unscale_
        scaler.update()
    elif optimizer.param_groups[0].get("fused") and devices.fused_adamw_heeds_found_inf(norm.device):
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
    elif math.isfinite(norm.item()):
        optimizer.step()
