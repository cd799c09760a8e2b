"""What recomputing the activations of backbone and encoder saves and costs in a training step.

    python -m benchmarks.activation_checkpointing [--size swin_t] [--height 320] [--width 448] [--images 2] [--steps 3]

Each setting runs in a process of its own: forward, losses, backward, with zeroed gradients in between. On a CPU the
memory is the peak resident set, on an accelerator what tensors used at most; weights and gradients are part of it.
"""

import argparse
import json
import subprocess
import sys
import time

import torch

from benchmarks.step_counts import training_batch
from groundingdino import devices
from groundingdino.config import MODEL_PRESETS
from groundingdino.model import build_detector
from groundingdino.structures import to_device
from groundingdino.training.criterion import Criterion
from groundingdino.training.step import TrainingStep


def measure(arguments: argparse.Namespace, on: bool) -> dict[str, float]:
    """Seconds of the fastest step and peak memory in GiB."""
    torch.manual_seed(0)
    device = devices.pick_device(arguments.device)
    model = build_detector(MODEL_PRESETS[arguments.size]()).to(device).train()
    model.set_activation_checkpointing(on)
    step = TrainingStep(model, Criterion(), arguments.precision)
    parts = training_batch(arguments.height, arguments.width, arguments.images)
    batch = [to_device(part, device) for part in parts]
    times = []
    for _ in range(arguments.steps):
        model.zero_grad(set_to_none=False)
        devices.synchronize(device)
        begin = time.perf_counter()
        step(*batch)["loss"].backward()
        devices.synchronize(device)
        times.append(time.perf_counter() - begin)
    return {"seconds": min(times), "gib": devices.peak_memory_mib(device) / 1024}


def main() -> None:
    """Run both settings and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=MODEL_PRESETS, default="swin_t")
    for name, default in (("--height", 320), ("--width", 448), ("--images", 2), ("--steps", 3)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--only", choices=("off", "on"), help="measure one setting in this process, print JSON")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments, arguments.only == "on")))
        return
    size = f"{arguments.size}, {arguments.images} x {arguments.height}x{arguments.width}, {arguments.precision}"
    print(f"{size}\n{'checkpointing':<14} {'s/step':>8} {'peak GiB':>9}")
    for setting in ("off", "on"):
        command = [sys.executable, "-m", "benchmarks.activation_checkpointing", *sys.argv[1:], "--only", setting]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(f"{setting:<14} {found['seconds']:>8.2f} {found['gib']:>9.2f}")


if __name__ == "__main__":
    main()
