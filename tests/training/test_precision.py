"""Half precision trains what single precision trains."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from gradient_ranks import NO_DROPOUT, float32_batch
from training_runs import small_config

from groundingdino.model import build_detector
from groundingdino.training.criterion import Criterion
from groundingdino.training.learner import Learner, to_float32


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


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_what_a_loss_is_computed_of_is_float32_in_either_half_precision(half: torch.dtype) -> None:
    numbers, mask = torch.ones(2, dtype=half), torch.ones(2, dtype=torch.bool)
    (inner,), kept, none = to_float32(([numbers], mask, None))
    assert inner.dtype == torch.float32 and kept is mask and none is None
