"""`groundingdino selfcheck --tune`: measure every formulation at the recipe's sizes, and keep what was found."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from groundingdino.cli import operator_report
from groundingdino.config import BackboneConfig, swin_b, swin_t
from groundingdino.ops import Windows, map_windows, ms_deform_attn_reference, window_attention_reference
from groundingdino.ops.ms_deform_attn import npu
from groundingdino.ops.ms_deform_attn import triton as on_gpu
from groundingdino.ops.ms_deform_attn.reference import ms_deform_attn_backward_reference
from groundingdino.ops.window_attention import FORMULATIONS, window_attention_as
from groundingdino.runtime import tuning
from groundingdino.runtime.tuning import Case, Clock, Measured, Table
from groundingdino.training.optimizer import ADAMW

STRIDES = (8, 16, 32, 64)  # of the levels that deformable attention reads
HEADS, CHANNELS, POINTS = 8, 32, 4


@dataclass(frozen=True)
class Recipe:
    """The sizes that training meets: the extremes of its multi-scale images, and its batches."""

    images: tuple[tuple[int, int], ...] = ((480, 480), (800, 1333))  # height, width
    batches: tuple[int, ...] = (1, 2, 3, 4)
    queries: int = 1100  # 900 and those of denoising
    parameters: int = 900
    backbones: tuple[BackboneConfig, ...] = (swin_t().backbone, swin_b().backbone)  # windows of 7 and of 12


def tune(device: torch.device, clock: Clock, recipe: Recipe) -> Table:
    """Times by `clock` of every formulation that is right; see `runtime.tuning`. ValueError on a CPU.

    Deformable attention must equal the composite in float64 on the host at the sizes of the self check, and the
    device's composite at the recipe's sizes.
    """
    if device.type == "cpu":
        raise ValueError("there is nothing to tune on a CPU: its kernels are the fastest; name a card with --device")
    operations: dict[str, Measured] = {}
    for direction, available in _deformable_attention(device).items():
        for site in ("encoder", "decoder"):
            cases = _deformable_cases(device, recipe, direction, site, available)
            operations[f"ms_deform_attn {direction}, {site}"] = tuning.measure(cases, clock)
    for backbone in recipe.backbones:
        for training in (False, True):
            name = f"window_attention {'training' if training else 'inference'}, {backbone.window_size**2} places"
            operations[name] = tuning.measure(_window_cases(device, recipe, backbone, training), clock)
    if device.type == "npu":  # whose fused AdamW is one kernel for each parameter
        operations[ADAMW] = tuning.measure(_adamw_cases(device, recipe), clock)
    return Table(tuning.machine(device), operations)


def _deformable_attention(device: torch.device) -> dict[str, Mapping]:
    """The formulations by direction, of the devices whose operator asks which one was the fastest.

    On a GPU the launches of its kernel; none where Triton cannot run.
    """
    if device.type == "npu":
        return {"forward": npu.FORWARD, "backward": npu.BACKWARD}
    usable = (
        device.type == "cuda" and on_gpu.kernel_problem(device, torch.float32, CHANNELS, len(STRIDES), True) is None
    )
    return on_gpu.launches() if usable else {}


def _deformable_cases(
    device: torch.device, recipe: Recipe, direction: str, site: str, available: Mapping
) -> Iterator[Case]:
    for name, sizes in operator_report.CASES.items():
        on_host = operator_report.inputs(*sizes)
        exact = partial(_exact, direction, sizes[4], on_host, device)
        calls = _calls(direction, available, sizes[4], [t.to(device) for t in on_host])
        yield Case(name, exact, calls, timed=False)
    for height, width in recipe.images:
        shapes = tuple((-(-height // stride), -(-width // stride)) for stride in STRIDES)
        tokens = sum(rows * columns for rows, columns in shapes)
        queries = tokens if site == "encoder" else recipe.queries
        single = [t.to(device) for t in operator_report.inputs(queries, HEADS, CHANNELS, POINTS, shapes)]
        for batch in recipe.batches:
            tensors = [t.repeat_interleave(batch, dim=0) for t in single]
            expected = partial(_results, direction, shapes, tensors)
            yield Case(f"{batch} x {height}x{width}", expected, _calls(direction, available, shapes, tensors))


def _results(direction: str, shapes: operator_report.Shapes, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Those of the composite: the output, or the three gradients."""
    value, locations, weights, grad = tensors
    if direction == "forward":
        return (ms_deform_attn_reference(value, shapes, locations, weights),)
    return ms_deform_attn_backward_reference(grad, value, shapes, locations, weights)


def _exact(
    direction: str, shapes: operator_report.Shapes, tensors: Sequence[Tensor], device: torch.device
) -> Sequence[Tensor]:
    return [t.float().to(device) for t in _results(direction, shapes, [t.double() for t in tensors])]


def _calls(direction: str, available: Mapping, shapes: operator_report.Shapes, tensors: Sequence[Tensor]) -> dict:
    value, locations, weights, grad = tensors
    if direction == "forward":
        return {name: lambda f=f: (f(value, shapes, locations, weights),) for name, f in available.items()}
    return {name: lambda f=f: f(grad, value, shapes, locations, weights) for name, f in available.items()}


def _window_cases(device: torch.device, recipe: Recipe, backbone: BackboneConfig, training: bool) -> Iterator[Case]:
    """Every stage's map, its windows shifted and not; forward and, in training, the gradients."""
    window = backbone.window_size
    generator = torch.Generator().manual_seed(0)
    batches = sorted({min(recipe.batches), max(recipe.batches)})
    for batch, (height, width), stage in itertools.product(batches, recipe.images, range(len(backbone.num_heads))):
        heads = backbone.num_heads[stage]
        rows, columns = (-(-size // (4 << stage)) for size in (height, width))
        sizes = ((batch, rows * columns, 3, heads, CHANNELS), (3, heads, CHANNELS), (heads, window**2, window**2))
        leaves = [torch.randn(size, generator=generator).to(device).requires_grad_(training) for size in sizes]
        for shift in (0, window // 2):
            windows = map_windows(rows, columns, window, shift, leaves[0])
            attend_by = {name: partial(window_attention_as, name) for name in FORMULATIONS}
            calls = {name: partial(_attended, attend, leaves, windows) for name, attend in attend_by.items()}
            expected = partial(_attended, window_attention_reference, leaves, windows)
            yield Case(f"{batch} x {rows}x{columns}, {heads} heads, shift {shift}", expected, calls)


def _attended(function: Callable[..., Tensor], leaves: list[Tensor], windows: Windows) -> Sequence[Tensor]:
    """Output and, where the leaves are trained, their gradients."""
    out = function(*leaves, windows)
    if not leaves[0].requires_grad:
        return (out,)
    return (out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out)))


def _adamw_cases(device: torch.device, recipe: Recipe) -> Iterator[Case]:
    """Steps of AdamW on as many parameters as the detector has."""
    generator = torch.Generator().manual_seed(0)
    size = (recipe.parameters, 256, 256)
    start, grads = (torch.randn(size, generator=generator).to(device) for _ in range(2))

    def steps(**options: Any) -> Callable[[], list[Tensor]]:
        weights = [torch.nn.Parameter(t.clone()) for t in start]
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        optimizer = torch.optim.AdamW(weights, lr=1e-2, **options)

        def step() -> list[Tensor]:
            optimizer.step()
            return [w.detach() for w in weights]

        return step

    calls = {"fused": steps(fused=True), "foreach": steps(foreach=True)}
    yield Case(f"{recipe.parameters} parameters of 65536 numbers", steps(foreach=False), calls)


def table_lines(table: Table) -> list[str]:
    """The table for people: by operation and case the milliseconds of each formulation."""
    lines = []
    for name, measured in table.operations.items():
        lines += ["", f"{name}: {measured.fastest() or 'nothing is right, the default remains'}"]
        for case, times in measured.milliseconds.items():
            lines += [f"  {case:30} " + ", ".join(f"{which} {time:.2f} ms" for which, time in times.items())]
        lines += [f"  refused: {which}: {why}" for which, why in measured.refused.items()]
    return lines


def print_tuning(device: torch.device, repeats: int) -> None:
    """Measure, print and keep the table of this card."""
    if repeats < 1:
        raise ValueError("--tune needs timed calls: leave --repeats out, or give at least 1")

    def clock(name: str, call: Callable[[], object]) -> float:
        return tuning.milliseconds(call, device, repeats)

    table = tune(device, clock, Recipe())
    print("\n".join(table_lines(table)))
    print(f"\nkept in {tuning.save_table(table, device)}")
