"""Loader processes that end, or cannot hand over what they have loaded, end the wait for it in one line."""

import os
import resource
import signal
import sys
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from groundingdino.runtime.loader_process import batches, end_with_a_lost_batch, loader_problem


class Failing(Dataset[torch.Tensor]):
    """Its process gets into trouble with the second sample."""

    def __init__(self, spare: int | None = None) -> None:
        self.spare = spare  # file descriptors that are left; None: the process is killed

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> torch.Tensor:
        if number == 1 and self.spare is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 1:
            time.sleep(1)  # the first batch leaves in a thread, whose descriptors would count as taken
            lowest = os.open("/dev/null", os.O_RDONLY)
            os.close(lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + self.spare, lowest + self.spare))
        return torch.zeros(3)


def problem_of(dataset: Failing) -> str:
    loader = DataLoader(dataset, 1, num_workers=1, timeout=60, worker_init_fn=end_with_a_lost_batch)
    with pytest.raises((ChildProcessError, RuntimeError)) as problem:
        for _ in batches(loader):
            time.sleep(0.5)
    # Torch raises wherever this process is just then: what the programs do with that is the same.
    found = problem.value
    return str(found) if isinstance(found, ChildProcessError) else loader_problem(found) or repr(found)


@pytest.mark.parametrize("spare", [0, 1, 2, 3])
def test_a_loader_process_without_file_descriptors_is_one_line_and_no_wait(spare: int, capfd) -> None:
    started = time.monotonic()
    assert problem_of(Failing(spare)).startswith("the limit of open files is reached: raise it")
    assert time.monotonic() - started < 30 and not capfd.readouterr().err


class Reported(Failing):
    """What Python does where a thread that hands over batches has no file descriptor."""

    def __getitem__(self, number: int) -> torch.Tensor:
        sys.excepthook(OSError, OSError(24, "Too many open files"), None)
        return torch.zeros(3)


def test_an_error_that_python_would_print_again_and_again_ends_the_process() -> None:
    assert problem_of(Reported()).startswith("the limit of open files is reached: raise it")


def test_a_killed_loader_process_is_one_line() -> None:
    assert problem_of(Failing()).startswith("a loader process was killed (Killed), perhaps by the out-of-memory killer")


def test_other_errors_stay_what_they_are() -> None:
    def loader():
        yield 1
        raise RuntimeError("shapes do not match")

    found = batches(loader())
    assert next(found) == 1
    with pytest.raises(RuntimeError, match="shapes do not match"):
        next(found)
    assert loader_problem(RuntimeError("DataLoader timed out after 3 seconds")).startswith("no batch came in time")
    assert "ran out of shared memory" in loader_problem(RuntimeError("unable to allocate shared memory(shm)"))
