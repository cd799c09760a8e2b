"""The state of every random generator that training draws from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch

from groundingdino.runtime import devices


def random_states(device: torch.device) -> dict[str, Any]:
    """The state of Python's, numpy's, torch's and the device's generators, as plain data and tensors."""
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(numpy.asarray(keys).astype("int64")), *rest],
        "torch": torch.get_rng_state(),
        "device": devices.random_state(device),
    }


def set_random_states(device: torch.device, states: dict[str, Any]) -> None:
    """The inverse of `random_states`."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(states["torch"])
    devices.set_random_state(device, states["device"])


def seed_everything(seed: int, rank: int) -> None:
    """Seed Python's, numpy's, torch's and the devices' generators, differently in each process."""
    random.seed(f"{seed}-{rank}")
    mixed = random.getrandbits(32)
    numpy.random.seed(mixed)
    torch.manual_seed(mixed)


@contextmanager
def kept_random_states(device: torch.device) -> Iterator[None]:
    """Restore the generators after the block, so that an evaluation does not change the training run around it."""
    states = random_states(device)
    try:
        yield
    finally:
        set_random_states(device, states)
