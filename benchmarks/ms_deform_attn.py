"""Deformable attention: the device's kernel against the grid_sample composite, at the sizes of one 800 x 1333 image.

python -m benchmarks ms_deform_attn [--rounds 5] [--threads 2] [--device cpu] [--hub-kernel]
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Literal

import tyro

# Before torch: it settles how large tensors get memory.
from groundingdino.runtime.devices import pick_device, prepare_device, synchronize, tune_process

# isort: split
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from groundingdino.ops import ms_deform_attn, ms_deform_attn_reference

SHAPES = ((100, 167), (50, 84), (25, 42), (13, 21))
HEADS, CHANNELS, POINTS = 8, 32, 4
DECODER_QUERIES = 900
TARGETS = {"encoder forward": 6.5, "encoder backward": 7.0, "decoder forward": 6.0, "decoder backward": 6.0}


def pixel_centres() -> Tensor:
    """(S, 2) where the encoder's queries are: (x, y) of every token, in [0, 1]."""
    grids = []
    for height, width in SHAPES:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        grids.append(torch.stack([x, y], dim=-1).view(-1, 2))
    return torch.cat(grids)


def inputs(part: Literal["encoder", "decoder"]) -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations and weights as an untrained model has them: each head looks one way, 1 to 4 pixels far.

    One pixel of noise is added; the decoder's queries are anywhere.
    """
    torch.manual_seed(0)
    centres = pixel_centres() if part == "encoder" else torch.rand(DECODER_QUERIES, 2)
    angles = torch.arange(HEADS) * 2 * torch.pi / HEADS
    ways = torch.stack([angles.cos(), angles.sin()], dim=-1)
    steps = (ways / ways.abs().amax(-1, keepdim=True))[:, None, None] * torch.arange(1, POINTS + 1)[:, None]
    pixels = steps + torch.randn(len(centres), HEADS, len(SHAPES), POINTS, 2)
    locations = centres[:, None, None, None] + pixels / torch.tensor([(w, h) for h, w in SHAPES])[:, None]
    weights = torch.randn(1, len(centres), HEADS, len(SHAPES) * POINTS).softmax(-1)
    value = torch.randn(1, sum(height * width for height, width in SHAPES), HEADS, CHANNELS)
    return value, locations[None], weights.view(1, -1, HEADS, len(SHAPES), POINTS)


def measure(functions: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each, called in turn; one round before that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            synchronize(device)
            started = time.perf_counter()
            function()
            synchronize(device)
            times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def compare(part: Literal["encoder", "decoder"], rounds: int, device: torch.device, hub: "Hub | None") -> None:
    """Print the rows of one part; the backward pass is autograd's, so the composite does not sample again in it."""
    leaves = [tensor.to(device).requires_grad_() for tensor in inputs(part)]
    value, locations, weights = leaves
    forwards = {
        "composite": lambda: ms_deform_attn_reference(value, SHAPES, locations, weights),
        "kernel": lambda: ms_deform_attn(value, SHAPES, locations, weights),
    }
    outputs = {name: forward() for name, forward in forwards.items()}
    grad = torch.randn_like(outputs["kernel"])
    backwards: dict[str, Callable] = {
        name: functools.partial(torch.autograd.grad, output, leaves, grad, retain_graph=True)
        for name, output in outputs.items()
    }
    if hub is not None:
        forwards["hub"] = lambda: hub.forward(*leaves)
        backwards["hub"] = lambda: hub.backward(*leaves, grad)
    with torch.no_grad():
        print_rows(f"{part} forward", forwards, rounds, device)
        print_rows(f"{part} backward", backwards, rounds, device)


class Hub:
    """The compiled operator that transformers fetches: Hugging Face's `kernels-community/deformable-detr`."""

    def __init__(self, device: torch.device) -> None:
        try:
            from kernels import get_kernel
        except ImportError:
            raise SystemExit("--hub-kernel needs the package kernels: pip install kernels") from None

        self.operator = get_kernel("kernels-community/deformable-detr")
        self.shapes = torch.tensor(SHAPES, device=device)
        sizes = self.shapes.prod(1)
        self.starts = sizes.cumsum(0) - sizes

    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        """(1, Q, M*C)."""
        return self.operator.ms_deform_attn_forward(value, self.shapes, self.starts, locations, weights, 64)

    def backward(self, value: Tensor, locations: Tensor, weights: Tensor, grad: Tensor) -> list[Tensor]:
        """Gradients of value, locations and weights."""
        return self.operator.ms_deform_attn_backward(value, self.shapes, self.starts, locations, weights, grad, 64)


def print_rows(name: str, functions: Mapping[str, Callable], rounds: int, device: torch.device) -> None:
    """Beside each of the others: medians, their ratio, and by how much of its maximum the first result differs."""
    results = {each: tree_leaves(function())[0] for each, function in functions.items()}
    median = measure(functions, rounds, device)
    for other in sorted(functions.keys() - {"kernel"}):
        difference = float((results[other] - results["kernel"]).abs().max() / results[other].abs().max())
        ratio = median[other] / median["kernel"]
        target = TARGETS[name] if other == "composite" else 1
        verdict = "met" if ratio >= target else "missed"
        times = f"{median[other]:.1f} ms | {median['kernel']:.1f} ms"
        print(f"| {name}, {other} | {times} | {ratio:.1f} | {target} | {verdict} | {difference:.0e} |")


def main(rounds: int = 5, threads: int = 2, device: str = "cpu", hub_kernel: bool = False) -> None:
    """Print a Markdown table of medians and ratios.

    `hub_kernel` adds Hugging Face's compiled operator, on a GPU: it needs the package `kernels`, which downloads it.
    """
    torch.set_num_threads(threads)
    place = pick_device(device)
    tune_process(place)  # as every program of the library does
    prepare_device(place)
    hub = Hub(place) if hub_kernel else None
    print(f"torch {torch.__version__}, {place}, {threads} threads, float32, medians of {rounds} alternating rounds\n")
    print("| | other | kernel | ratio | target | | largest difference |\n|---|---|---|---|---|---|---|")
    for part in ("encoder", "decoder"):
        compare(part, rounds, place, hub)


if __name__ == "__main__":
    tyro.cli(main)
