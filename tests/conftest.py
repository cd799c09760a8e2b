"""Shared paths and a single thread a test process, so that numbers and times do not depend on the machine."""

import importlib
import logging
import os
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of values that mmdet computed."""
    return GOLDEN


torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--fuzz SECONDS`."""
    parser.addoption("--fuzz", type=float, help="seconds of new cases for each test of tests/fuzz")


@pytest.fixture
def kernels_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are the CPU kernel's where it can be had, however little there is to multiply."""
    monkeypatch.setattr(importlib.import_module("groundingdino.ops.linear"), "MIN_MULTIPLY_ADDS", 0)


@pytest.fixture(params=["kernels", "plain torch"])
def each_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kernels_for_all_sizes: None) -> None:
    """The test twice: with our kernels where they can be had, and without."""
    if request.param == "plain torch":
        monkeypatch.setenv("GROUNDINGDINO_KERNELS", "off")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """No test touches the user's cache of converted and downloaded weights."""
    os.environ["GROUNDINGDINO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def log_as_before():
    """A program that a test ran in this process leaves its log's level and form to no other test."""
    logger = logging.getLogger("groundingdino")
    level, handlers = logger.level, logger.handlers[:]
    yield
    logger.setLevel(level)
    logger.handlers = handlers
