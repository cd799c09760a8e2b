"""Half precision trains what single precision trains."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from gradient_ranks import NO_DROPOUT, float32_batch
from training_runs import small_config

from groundingdino.model import build_detector
from groundingdino.training.criterion import Criterion
from groundingdino.training.learner import Learner


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
