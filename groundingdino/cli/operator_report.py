"""The report of `groundingdino selfcheck`: what deformable attention does on this machine."""

import functools
import os
import platform
from collections.abc import Callable

import torch
from torch import Tensor

from groundingdino import __version__
from groundingdino.ops import cpu_library, ms_deform_attn, ms_deform_attn_reference
from groundingdino.ops.ms_deform_attn import npu, triton
from groundingdino.runtime import bootstrap, devices, tuning
from groundingdino.runtime.kernels import OLD_VARIABLE, VARIABLE, kernel_mode
from groundingdino.runtime.tuning import installed_version, milliseconds

# A kernel sums in its own order and, on a card, multiplies approximately; wrong results are off by whole numbers.
TOLERANCE = 1e-3
Shapes = tuple[tuple[int, int], ...]
CASES: dict[str, tuple[int, int, int, int, Shapes]] = {  # queries, heads, channels, points, level sizes
    "detector": (900, 8, 32, 4, ((25, 34), (13, 17), (7, 9), (4, 5))),
    "one query": (1, 8, 32, 4, ((7, 9), (4, 5))),
    "12 channels": (40, 8, 12, 4, ((7, 9), (4, 5))),
    "one point": (40, 8, 32, 1, ((7, 9), (4, 5))),
    "five levels": (40, 8, 32, 4, ((9, 8), (5, 4), (3, 2), (2, 1), (1, 1))),
}
ENCODER = (((100, 167), (50, 84), (25, 42), (13, 21)), 8, 32, 4)  # an 800x1333 image


def environment_lines(device: torch.device) -> list[str]:
    """Versions and settings that a report needs."""
    names = ("ASCEND_HOME_PATH", "TASK_QUEUE_ENABLE", "PYTORCH_NPU_ALLOC_CONF", "OMP_NUM_THREADS")
    variables = [f"{name}={os.environ[name]}" for name in (*names, VARIABLE, OLD_VARIABLE) if name in os.environ]
    lines = [
        f"python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        f"torch {torch.__version__}, torch_npu {installed_version('torch_npu')}, groundingdino {__version__}",
        f"device {device}"
        + (f" ({torch.get_device_module(device).get_device_name()})" if device.type != "cpu" else ""),
        f"environment: {' '.join(variables) or 'nothing set'}",
    ]
    if device.type == "npu":
        get_version = getattr(torch.get_device_module(device).utils, "get_cann_version", None)
        lines.append(f"CANN {(get_version and get_version()) or 'of unknown version'}")
    elif bootstrap.has_torch_npu():
        lines.append(f"no NPU: {devices.npu_problem()}")
    return lines


def path_line(device: torch.device) -> str:
    """Which implementation the detector's sizes get."""
    if kernel_mode("ms_deform_attn") == "off":
        return f"path: grid_sample, because {VARIABLE} says off"
    if device.type == "npu":
        problem = npu.binding_problem()
        return (
            f"path: grid_sample, because {problem}" if problem else f"path: {torch.ops.groundingdino_aclnn.library()}"
        )
    if device.type == "cpu" and cpu_library.library() is not None:
        return "path: our CPU kernel"
    if device.type == "cuda":
        problem = triton.kernel_problem(device, torch.float32, channels=32, levels=4, backward=True)
        return f"path: grid_sample, because {problem}" if problem else "path: our Triton kernels"
    return f"path: grid_sample, there is no kernel for {device.type}" + (" built" if device.type == "cpu" else "")


def measured_lines(device: torch.device) -> list[str]:
    """What `--tune` has found on this card earlier and is used now."""
    table = None if device.type == "cpu" else tuning.load_table(device)
    if table is None:
        return []
    chosen = {name: measured.fastest() for name, measured in table.operations.items()}
    return [f"measured: {name}: {formulation or 'default'}" for name, formulation in chosen.items()]


def inputs(queries: int, heads: int, channels: int, points: int, shapes: Shapes) -> list[Tensor]:
    """value, locations, weights of one image and a gradient of the output, float32 on the CPU.

    Locations keep off the pixels' centres, where the gradient jumps, and a few lie outside.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(1, tokens, heads, channels, generator=generator)
    sizes = torch.tensor([(width, height) for height, width in shapes])[:, None]  # (L, 1, 2)
    place = (1, queries, heads, len(shapes), points, 2)
    whole = (torch.rand(place, generator=generator) * (sizes + 1)).floor() - 1
    locations = (whole + 0.5 + 0.1 + 0.8 * torch.rand(place, generator=generator)) / sizes
    weights = torch.rand(1, queries, heads, len(shapes), points, generator=generator)
    return [value, locations, weights, torch.randn(1, queries, heads * channels, generator=generator)]


def run(function: Callable, shapes: Shapes, arguments: list[Tensor]) -> list[Tensor]:
    """Output and the gradients of value, locations and weights."""
    leaves = [t.detach().requires_grad_() for t in arguments[:3]]
    output = function(leaves[0], shapes, leaves[1], leaves[2])
    return [output.detach(), *torch.autograd.grad(output, leaves, arguments[3])]


def worst_error(name: str, device: torch.device) -> float:
    """Largest difference of output and gradients to the composite, relative to each one's largest entry."""
    queries, heads, channels, points, shapes = CASES[name]
    arguments = inputs(queries, heads, channels, points, shapes)
    expected = run(ms_deform_attn_reference, shapes, [t.double() for t in arguments])
    found = run(ms_deform_attn, shapes, [t.to(device) for t in arguments])
    pairs = zip(found, expected, strict=True)
    return max(((a.cpu().double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def timing_lines(device: torch.device, repeats: int) -> list[str]:
    """Time of the operator and of the composite for the encoder of one 800x1333 image."""
    shapes, heads, channels, points = ENCODER
    tokens = sum(height * width for height, width in shapes)
    arguments = [t.to(device) for t in inputs(tokens, heads, channels, points, shapes)]
    lines = [f"one encoder layer of an 800x1333 image, {tokens} tokens, float32:"]
    for name, function in (("operator", ms_deform_attn), ("composite", ms_deform_attn_reference)):
        with torch.no_grad():
            call = functools.partial(function, arguments[0], shapes, *arguments[1:3])
            forward = milliseconds(call, device, repeats)
        both = milliseconds(functools.partial(run, function, shapes, arguments), device, repeats)
        lines.append(f"  {name:9} forward {forward:9.2f} ms, forward and backward {both:9.2f} ms")
    return lines


def ready_device(name: str) -> torch.device:
    """The device of this name, set up as the programs set it up. ValueError for no device."""
    device = devices.pick_device(name)
    devices.tune_process(device)
    devices.prepare_device(device)
    return device


def print_report(device: torch.device, repeats: int) -> int:
    """Print the report; 1 where a result is wrong, else 0."""
    lines = [*environment_lines(device), path_line(device), *measured_lines(device)]
    print("\n".join([*lines, "", "error relative to the composite in float64:"]))
    wrong = 0
    for case in CASES:
        error = worst_error(case, device)
        good = error < TOLERANCE
        wrong += not good
        print(f"  {case:12} {error:.1e}  {'ok' if good else 'WRONG'}")
    if repeats > 0:
        print("\n".join(["", *timing_lines(device, repeats)]))
    return 1 if wrong else 0
