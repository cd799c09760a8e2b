"""Half precision trains what single precision trains."""

import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch
from gradient_ranks import NO_DROPOUT, whole_batch
from training_runs import small_config

from groundingdino.data.batch import Batch
from groundingdino.model import build_detector
from groundingdino.training.criterion import Criterion
from groundingdino.training.learner import Learner


def float32_batch() -> Batch:
    """Two images with one and two objects."""
    batch, _ = whole_batch((1, 2))
    images = dataclasses.replace(batch.images, pixels=batch.images.pixels.float())
    return dataclasses.replace(
        batch, images=images, targets=dataclasses.replace(batch.targets, boxes=batch.targets.boxes.float())
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(precision: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = build_detector(NO_DROPOUT)
    model.set_activation_checkpointing(checkpointing)
    config = small_config(Path("unused"), Path("unused"), ema_decay=0.0, precision=precision)
    learner = Learner(model, Criterion(), config, torch.device("cpu"))
    with mock.patch.object(learner.optimizer, "zero_grad", lambda set_to_none: None):
        learner.step([float32_batch()], 1.0)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
