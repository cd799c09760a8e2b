"""Shared paths and a single thread a test process, so that numbers and times do not depend on the machine."""

from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of values that mmdet computed."""
    return GOLDEN


torch.set_num_threads(1)
