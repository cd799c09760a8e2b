"""What is said of a run's time before it starts."""

import logging
from pathlib import Path

import pytest
import torch
from training_runs import SMALL, small_config

from groundingdino.model import build_detector
from groundingdino.runtime.distributed import World
from groundingdino.training import estimate
from groundingdino.training.criterion import Criterion
from groundingdino.training.learner import Learner
from groundingdino.training.setup import training_loader

TIMES = {
    3: "3 s",
    30: "30 s",
    89: "1 min",
    91: "2 min",
    119: "2 min",
    3560: "59 min",
    3590: "1 h 0 min",
    9000: "2 h 30 min",
}


def test_the_time_of_a_run_is_that_of_its_steps_rounded_to_minutes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "groundingdino")
    monkeypatch.setattr(estimate, "_trial", lambda learner, batch: 0.5)
    config = small_config(data, tmp_path / "run", accumulation_steps=2)
    learner = Learner(build_detector(SMALL), Criterion(), config, torch.device("cpu"))
    loader = training_loader(config, SMALL, World(0, 0, 1, learner.device))
    for steps in TIMES:  # of two batches of half a second
        estimate.Estimate().on_start(learner, loader, steps)
    said = [line for line in caplog.messages if "evaluation not counted" in line]
    assert said == [f"about {time} for {steps:,} steps, evaluation not counted" for steps, time in TIMES.items()]
