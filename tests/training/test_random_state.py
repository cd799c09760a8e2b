"""Every generator that training or a user's code may draw from."""

import random

import numpy
import pytest
import torch

from groundingdino.training.random_state import kept_random_states, seed_everything

DRAWS = {"python": random.random, "numpy": numpy.random.random, "torch": lambda: torch.rand(()).item()}


@pytest.mark.parametrize("name", DRAWS)
def test_a_seed_decides_each_generator_and_each_process_draws_other_numbers(name: str) -> None:
    def drawn(seed: int, rank: int) -> float:
        seed_everything(seed, rank)
        return DRAWS[name]()

    with kept_random_states(torch.device("cpu")):
        assert drawn(1, 0) == drawn(1, 0)
        assert len({drawn(1, 0), drawn(1, 1), drawn(2, 0)}) == 3


@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_in_a_block_that_keeps_the_generators_leaves_no_trace(name: str) -> None:
    with kept_random_states(torch.device("cpu")):
        seed_everything(1, 0)
        expected = DRAWS[name]()
        seed_everything(1, 0)
        with kept_random_states(torch.device("cpu")):
            DRAWS[name]()
        assert DRAWS[name]() == expected
