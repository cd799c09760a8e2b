"""Counts of one training step on the simulated NPU: python tests/npu_simulator/budget.py --height 640 --width 853

By phase: kernels, the bytes that they read and write, matmul FLOPs by type, calls of deformable attention, reads by the
host. And what cards exchange. Sizes are real, so it takes the time and the memory of a step in plain torch on the CPU.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("FAKE_CANN_MEMORY_MIB", "65536")

from npu_simulator import simulator

if __name__ == "__main__":
    simulator.install()  # as a module of a test, the plugin has done that

import torch
from gradient_ranks import whole_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from groundingdino.config import MODEL_PRESETS
from groundingdino.data import Batch
from groundingdino.model import build_detector
from groundingdino.runtime import devices
from groundingdino.structures import ImageBatch
from groundingdino.training.criterion import Criterion
from groundingdino.training.learner import Learner
from groundingdino.training.recipes import refcoco

NO_KERNEL = ("detach", "alias", "lift_fresh", "_local_scalar_dense", "is_pinned", "_pin_memory", "set_", "resize_")


class Counting(TorchDispatchMode):
    """Counters by phase, which `phase` names. An operator that makes no view counts as one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.by_operator: Counter[str] = Counter()
        self.bytes_by_operator: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if not any(t.device.type == "npu" for t in (*inputs, *outputs)):
            return result
        known = {t.untyped_storage().data_ptr() for t in inputs}
        written = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        is_view = outputs and not written and all(t.untyped_storage().data_ptr() in known for t in outputs)
        if is_view or name in NO_KERNEL or "empty" in name:
            return result
        moved = sum(t.numel() * t.element_size() for t in {id(t): t for t in (*inputs, *outputs)}.values())
        self.kernels[self.phase] += 1
        self.bytes[self.phase] += moved
        self.by_operator[name] += 1
        self.bytes_by_operator[name] += moved
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
            self.flops[f"{self.phase} {str(inputs[0].dtype).removeprefix('torch.')}"] += flops
        return result


@contextlib.contextmanager
def phases(counting: Counting) -> Iterator[None]:
    """Set `counting.phase` as a step of a learner goes on."""

    def entering(owner: Any, name: str, phase: str, after: str) -> Any:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counting.phase = phase
            try:
                return original(*args, **kwargs)
            finally:
                counting.phase = after

        return mock.patch.object(owner, name, wrapped)

    with (
        entering(Criterion, "forward", "matching and losses", "backward"),
        entering(torch.Tensor, "backward", "backward", "optimizer"),
    ):
        yield


def step_counts(arguments: argparse.Namespace) -> tuple[Counting, Learner, dict[str, int]]:
    """The counters of the second step, the learner, and what the runtime has seen of it."""
    device = devices.pick_device("npu")
    devices.tune_process(device)
    devices.prepare_device(device)
    torch.manual_seed(0)
    model = build_detector(MODEL_PRESETS[arguments.model]())
    model.set_activation_checkpointing(not arguments.no_checkpointing)
    config = dataclasses.replace(refcoco(), precision=arguments.precision, device="npu")
    learner = Learner(model, Criterion(), config, device)
    small, large = (_batch(arguments.batch, *size) for size in ((64, 64), (arguments.height, arguments.width)))
    learner.step([small], 1.0)  # makes optimizer state, and copies once what is kept
    torch.npu.synchronize()
    before = simulator.counters()
    with Counting() as counting, phases(counting):
        learner.step([large], 1.0)
    torch.npu.synchronize()
    after = simulator.counters()
    return counting, learner, {name: after[name] - before[name] for name in after}


def _batch(images: int, height: int, width: int) -> Batch:
    """Random pixels, a sentence and an object for each image; float32."""
    batch, _ = whole_batch((1,) * images)
    pixels, valid = torch.randn(images, 3, height, width), torch.ones(images, height, width, dtype=torch.bool)
    assert batch.targets is not None
    targets = dataclasses.replace(batch.targets, boxes=batch.targets.boxes.float())
    return dataclasses.replace(batch, images=ImageBatch(pixels, valid, padded=False), targets=targets)


def lines(counting: Counting, learner: Learner, runtime: dict[str, int]) -> list[str]:
    """The tables, as Markdown."""
    found = ["| phase | kernels | GB read and written | matmul TFLOP by type |", "|---|---|---|---|"]
    for phase in counting.kernels:
        flops = {n.split()[-1]: f / 1e12 for n, f in counting.flops.items() if n.rsplit(" ", 1)[0] == phase}
        shown = ", ".join(f"{dtype} {value:.2f}" for dtype, value in flops.items())
        found.append(f"| {phase} | {counting.kernels[phase]} | {counting.bytes[phase] / 1e9:.1f} | {shown} |")
    total = sum(counting.kernels.values()), sum(counting.bytes.values()) / 1e9, sum(counting.flops.values()) / 1e12
    found += ["| all | {} | {:.1f} | {:.2f} |".format(*total), ""]
    attention = {n: c for n, c in counting.by_operator.items() if "deform" in n or n in ("forward", "backward")}
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    buckets, _ = torch.distributed._compute_bucket_assignment_by_size(parameters, [1 << 20, 25 << 20])
    exchanged = sum(p.numel() * p.element_size() for p in parameters)
    found += [
        f"deformable attention {attention}; runtime {runtime}",
        f"{len(parameters)} gradients, {exchanged / 1e6:.0f} MB exchanged in {len(buckets)} buckets of 25 MiB",
        f"peak memory {torch.npu.max_memory_allocated() / 2**30:.1f} GiB",
        "most kernels: " + ", ".join(f"{n} {c}" for n, c in counting.by_operator.most_common(20)),
        "most bytes: " + ", ".join(f"{n} {c / 1e9:.1f} GB" for n, c in counting.bytes_by_operator.most_common(20)),
    ]
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="swin_b", choices=list(MODEL_PRESETS))
    parser.add_argument("--height", type=int, default=640)
    parser.add_argument("--width", type=int, default=853)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--no-checkpointing", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    print("\n".join(lines(*step_counts(parse()))))
