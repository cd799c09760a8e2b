"""Ten thousand predictions of mixed sizes by one process: how large it grows.

python -m benchmarks soak [--predictions 10000] [--plot-to docs/soak.png]
"""

import dataclasses
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import tyro

from groundingdino.config import quickstart_model
from groundingdino.inference.predictor import Predictor
from groundingdino.inference.prompts import Categories, Phrases, Prompt, Referring
from groundingdino.model import build_detector

WARM_UP = 100  # predictions that memory is compared with
ALLOWED = 100.0  # MiB of growth after them
EACH = 100  # predictions per point of the curve
SCALE = (48, 80)
WORDS = "cat dog man ball tree car house bird lamp door table chair cup book phone shoe hat bag boat horse".split()


def resident_mib() -> float:
    """Resident set of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def random_prompt(draw: random.Random) -> Prompt:
    """One of the kinds of prompts, of any length."""
    words = [draw.choice(WORDS) for _ in range(draw.randint(1, 20))]
    kind = draw.randrange(3)
    if kind == 0:
        return Categories(sorted(set(words)))
    return Referring(" ".join(words)) if kind == 1 else Phrases("a " + " and a ".join(words))


def soak(predictor: Predictor, predictions: int, seed: int = 0) -> list[tuple[int, float]]:
    """(predictions so far, MiB) every `EACH` predictions."""
    draw, pixels = random.Random(seed), np.random.default_rng(seed)
    curve = []
    for count in range(1, predictions + 1):
        height, width = draw.randint(8, 400), draw.randint(8, 400)
        image = pixels.integers(0, 256, (height, width, 3), dtype=np.uint8)
        predictor.predict([image] * draw.randint(1, 2), random_prompt(draw), batch_size=2, threshold=0.0)
        if count % EACH == 0:
            curve.append((count, resident_mib()))
    return curve


def plot(curve: list[tuple[int, float]], path: Path) -> None:
    """Memory over predictions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*curve, strict=True))
    axes.axhline(curve[0][1] + ALLOWED, linestyle="--", color="gray", linewidth=1)
    axes.set(xlabel="predictions", ylabel="resident set, MiB", ylim=(0, None))
    figure.savefig(path, dpi=90)


def main(predictions: int = 10_000, plot_to: Path | None = None, threads: int = 1) -> None:
    """Predict on random images of 8 to 400 pixels a side, alone and in pairs, with 1 to 20 words.

    Args:
        predictions: calls.
        plot_to: picture of the curve.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    started = time.perf_counter()
    config = dataclasses.replace(quickstart_model(), enhancer_layers=1, decoder_layers=1)
    curve = soak(Predictor(build_detector(config), scale=SCALE), predictions)
    first, largest = curve[WARM_UP // EACH - 1][1], max(mib for _, mib in curve)
    print("| predictions | MiB |\n|---|---|")
    for count, mib in curve[:: max(1, len(curve) // 10)] + curve[-1:]:
        print(f"| {count:,} | {mib:.0f} |")
    print(f"\nlargest growth after {WARM_UP}: {largest - first:.0f} MiB, in {time.perf_counter() - started:.0f} s")
    if plot_to is not None:
        plot(curve, plot_to)
    if largest - first > ALLOWED:
        sys.exit(f"grew by more than {ALLOWED:.0f} MiB")


if __name__ == "__main__":
    tyro.cli(main)
