"""One optimizer step's gradients on one process or many, for test_ranks.py: python gradient_ranks.py OUT.

In float64, so that what differs between processes is not rounding. Each process takes its share of the images.
"""

import dataclasses
import sys
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from training_runs import SMALL, small_config

from groundingdino.data.batch import Batch
from groundingdino.inputs.text import CaptionTokenizer, collate_text
from groundingdino.model import DenoisingNoise, build_detector, lora
from groundingdino.runtime import distributed
from groundingdino.structures import ImageBatch, Targets
from groundingdino.training.criterion import Criterion
from groundingdino.training.learner import Learner

CASES = {  # objects of each image, micro-batches per step and process
    "one object each": ((1, 1), 1),
    "a rank without objects": ((1, 0), 1),
    "no objects at all": ((0, 0), 1),
    "two objects and none": ((2, 0), 1),
    "accumulated": ((1, 1, 1, 1), 2),
    "accumulated, some without objects": ((1, 0, 0, 0), 2),
    "adapters": ((2, 1), 1),
}
NO_DROPOUT = dataclasses.replace(
    SMALL, fusion_dropout=0.0, backbone=dataclasses.replace(SMALL.backbone, drop_path_rate=0.0)
)
GROUPS = 3


def whole_batch(counts: tuple[int, ...]) -> tuple[Batch, DenoisingNoise]:
    """All images of the step, with the draws of all denoising queries; float64."""
    generator = torch.Generator().manual_seed(1)
    images, objects = len(counts), max(*counts, 1)
    tokenizer = CaptionTokenizer()
    text = collate_text([tokenizer.encode("the small red circle left of the star. ")] * images)
    valid = torch.arange(objects) < torch.tensor(counts)[:, None]
    boxes = torch.rand(images, objects, 4, generator=generator, dtype=torch.float64) * 0.3 + 0.3
    named = torch.zeros(images, objects, text.token_ids.shape[1], dtype=torch.bool)
    named[:, :, 1:5] = valid[..., None]
    targets = Targets(boxes * valid[..., None], named, valid.long(), valid, counts)
    pixels = torch.randn(images, 3, 64, 64, generator=generator, dtype=torch.float64)
    batch = ImageBatch(pixels, torch.ones(images, 64, 64, dtype=torch.bool), padded=False)
    shape = (images, GROUPS, 2, objects)
    noise = DenoisingNoise(
        torch.rand(shape, generator=generator),
        torch.randint(NO_DROPOUT.num_labels, shape, generator=generator),
        torch.randint(2, (*shape, 4), generator=generator) * 2.0 - 1.0,
        torch.rand((*shape, 4), generator=generator, dtype=torch.float64),
    )
    return Batch(batch, text, targets, ()), noise


def part_of(record: Any, start: int, stop: int) -> Any:
    """The images [start, stop) of a record; every tensor and tuple in it has one entry an image."""
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    kept = {name: value if isinstance(value, bool) else value[start:stop] for name, value in fields.items()}
    return dataclasses.replace(record, **kept)


def gradients_of(case: str, world: distributed.World, **changes: Any) -> dict[str, Tensor]:
    """Every parameter's gradient after this process's share of the step and the exchange with the others."""
    counts, micro_batches = CASES[case]
    micro_batches = micro_batches if world.size > 1 else 1
    torch.manual_seed(0)
    model = build_detector(NO_DROPOUT).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sampling_offsets" in name:  # fresh ones are whole pixels, where bilinear sampling has a kink
                parameter.add_(torch.randn_like(parameter) * 0.05)
    if case == "adapters":
        lora.add_adapters(model, 4, lora.PARTS)
        for name, parameter in model.named_parameters():
            if name.endswith(".0.b"):  # zero at first, and so is the gradient of A
                nn.init.normal_(parameter, std=0.02)
    config = small_config("unused", "unused", ema_decay=0.0, **changes)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, clip_norm=0.0))
    learner = Learner(model, Criterion(), config, world.device)
    batch, noise = whole_batch(counts)
    share = len(counts) // (world.size * micro_batches)
    batches, draws = [], []
    for number in range(micro_batches):
        start = (world.rank * micro_batches + number) * share
        images, text, targets, drawn = (
            part_of(part, start, start + share) for part in (batch.images, batch.text, batch.targets, noise)
        )
        batches.append(Batch(images, text, targets, ()))
        draws.append(drawn)
    kept: dict[str, Tensor] = {}
    with mock.patch.object(learner.optimizer, "zero_grad", lambda set_to_none: kept.update(cloned(model))):
        learner.step(batches, 1.0, draws)
    return kept


def cloned(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients; what is trained has one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def main(out: str) -> None:
    """Every case; the main process writes `out` with `case/parameter` -> gradient."""
    world = distributed.init("cpu", timeout_minutes=1)
    found = {f"{case}/{name}": grad for case in CASES for name, grad in gradients_of(case, world).items()}
    rounded = gradients_of("one object each", world, exchange_precision="bf16")
    found |= {f"bfloat16/{name}": grad for name, grad in rounded.items()}
    if world.rank == 0:
        save_file(found, out)
    distributed.shutdown()


def float32_batch() -> Batch:
    """Two images with one and two objects."""
    batch, _ = whole_batch((1, 2))
    images = dataclasses.replace(batch.images, pixels=batch.images.pixels.float())
    return dataclasses.replace(
        batch, images=images, targets=dataclasses.replace(batch.targets, boxes=batch.targets.boxes.float())
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
