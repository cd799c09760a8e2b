"""Operators and host reads of one training step: what an accelerator would have to launch and to wait for.

    python -m benchmarks counts            MM-GDINO-B, 2 images of 320x448, one sentence each

Counts what reaches the dispatcher below autograd in forward, loss and backward. Views launch nothing and are not
counted; a host read makes the device wait for the host. Needs no device: counts do not depend on it, except that on the
CPU `.cpu()` copies nothing, so the matcher's single read is counted where it happens, at `match`, and that the CPU has
kernels of its own. It is counted with these, and with deformable attention's alone, which is what an accelerator has.
"""

import argparse
import importlib
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from groundingdino.config import MODEL_PRESETS
from groundingdino.inputs.text import CaptionTokenizer, collate_text, finish_caption, positive_map
from groundingdino.model import backbone, build_detector
from groundingdino.ops import window_attention_reference
from groundingdino.structures import ImageBatch, Targets
from groundingdino.training import criterion as criterion_module
from groundingdino.training.criterion import Criterion

CAPTIONS = ("the man in the red shirt on the left", "second zebra from right")
SCALAR_READS = ("_local_scalar_dense",)
OTHER_READS = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "bincount")
PEERS = {"mmdet 3.3.0": (12111, 278, 113), "transformers 4.57": (7248, 113, 7)}  # figures given to this project


class OperatorCount(TorchDispatchMode):
    """Counts operators that compute, and those that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        boolean_index = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]
        )
        if name in (*SCALAR_READS, *OTHER_READS) or boolean_index:
            self.reads[name] += 1
        elif not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            self.operators[name] += 1
        return func(*args, **(kwargs or {}))


def training_batch(height: int, width: int, images: int = 2) -> tuple[ImageBatch, Any, Targets]:
    """Random pixels, `images` sentences, one object each that the whole sentence names."""
    encoder = CaptionTokenizer()
    captions = [finish_caption(CAPTIONS[i % len(CAPTIONS)]) for i in range(images)]
    encoded = [encoder.encode(caption) for caption in captions]
    text = collate_text(encoded)
    tokens = text.token_ids.shape[1]
    named = torch.stack([
        positive_map(e, [[[0, len(c) - 2]]], tokens) for e, c in zip(encoded, captions, strict=True)
    ])  # fmt: skip
    pixels, valid = torch.randn(images, 3, height, width), torch.ones(images, height, width, dtype=torch.bool)
    boxes = torch.tensor([0.4, 0.5, 0.3, 0.2]).expand(images, 1, 4)
    labels, real = torch.zeros(images, 1, dtype=torch.int64), torch.ones(images, 1, dtype=torch.bool)
    return (
        ImageBatch(pixels, valid, padded=False),
        text,
        Targets(boxes, named, labels, real, (1,) * images),
    )


def as_on_an_accelerator() -> ExitStack:
    """A context in which window attention and products are torch's."""
    stack = ExitStack()
    stack.enter_context(patch.object(backbone, "window_attention", window_attention_reference))
    for name in ("linear", "feed_forward"):
        module = importlib.import_module(f"groundingdino.ops.{name}")
        stack.enter_context(patch.object(module, "uses_cpu_kernel", lambda *_: False))
    return stack


def count_step(preset: str, height: int, width: int) -> tuple[OperatorCount, int, int]:
    """Counts of a step, how many of the operators were the forward pass, and how often the matcher read the device."""
    torch.manual_seed(0)  # as many branches are skipped each time
    model, criterion = build_detector(MODEL_PRESETS[preset]()).train(), Criterion()
    images, text, targets = training_batch(height, width)
    with OperatorCount() as count, patch.object(criterion_module, "match", wraps=criterion_module.match) as matching:
        output = model(images, text, targets)
        forward = sum(count.operators.values())
        torch.stack(list(criterion(output, targets).values())).sum().backward()
    return count, forward, matching.call_count


def main() -> None:
    """Print the counts beside the peers'."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="swin_b", choices=MODEL_PRESETS)
    parser.add_argument("--size", type=int, nargs=2, default=(320, 448), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--most", type=int, default=0, help="list so many operators, most frequent first")
    options = parser.parse_args()
    with as_on_an_accelerator():
        accelerator = count_step(options.preset, *options.size)
    cpu = count_step(options.preset, *options.size)
    print(f"{'':32}operators  forward  scalar reads  other reads")
    for name, (counted, forward, matching) in {"accelerator": accelerator, "CPU": cpu}.items():
        operators, reads = sum(counted.operators.values()), sum(counted.reads.values())
        scalar = sum(counted.reads[read] for read in SCALAR_READS)
        name = f"groundingdino, {name}"
        print(f"{name:32}{operators:9,}{forward:9,}{scalar:14,}{reads - scalar + matching:13,}")
    for name, (total, scalars, others) in PEERS.items():
        print(f"{name:32}{total:9,}{'':9}{scalars:14,}{others:13,}")
    for name, times in cpu[0].operators.most_common(options.most):
        print(f"{times:6,} {name}")
    for name, times in cpu[0].reads.items():
        print(f"{times:6,} {name} (read)")


if __name__ == "__main__":
    main()
