"""A data set and an uninterrupted run on it, which other runs are compared with."""

from pathlib import Path

import pytest
from training_runs import LAST_STEP, losses, scenes, small_config

from groundingdino.training.trainer import fit


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="session")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    fit(small_config(data, run))
    assert sorted(losses(run)) == list(range(1, LAST_STEP + 1))
    return run
