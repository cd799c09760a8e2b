"""Processes of torch's data loader that end or cannot hand over a batch: one line in place of a wait."""

import errno
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from multiprocessing.queues import Queue
from typing import TypeVar

T = TypeVar("T")

SHARED_MEMORY = "/dev/shm"
SETTLED = 1.0  # seconds after which it is known that a process has ended
KNOWN: dict[int | None, str] = {  # exit codes of loader processes, and what they mean
    errno.EMFILE: "the limit of open files is reached: raise it (`ulimit -n`), or try fewer workers, 0 uses none",
    errno.ENOSPC: f"a loader process ran out of shared memory ({SHARED_MEMORY}): try fewer workers, 0 uses none",
}


def end_with_a_lost_batch(worker: int = 0) -> None:
    """For `worker_init_fn`: a loader process ends where a batch cannot leave it, and its exit code says why.

    Python prints the errors of the threads that send batches, over and over where no file can be opened, and goes on:
    the process that waits for the batch would wait until its time is out.
    """
    Queue._on_queue_feeder_error = staticmethod(lambda error, batch: _end(error))  # type: ignore[attr-defined]
    sys.excepthook = lambda kind, error, trace: _end(error)


def _end(error: BaseException) -> None:
    code = _reason(str(error))
    if code is None:
        print(f"a loader process cannot hand over a batch: {error!r}", file=sys.stderr, flush=True)
    os._exit(code or 1)


def _reason(text: str) -> int | None:
    if "Too many open files" in text or "ancdata" in text:
        return errno.EMFILE
    if "shared memory" in text or "No space left on device" in text:
        return errno.ENOSPC
    return None


def batches(loader: Iterable[T]) -> Iterator[T]:
    """What a loader yields. ChildProcessError in one line where one of its processes has ended."""
    try:
        try:
            yield from loader
        except (EOFError, ConnectionError):  # it ended while it handed over a batch
            time.sleep(SETTLED)  # torch's signal handler raises here, and says how
            raise
    except (EOFError, ConnectionError, RuntimeError) as error:
        problem = loader_problem(error)
        if problem is None:
            raise
        raise ChildProcessError(problem) from error


def loader_problem(error: BaseException) -> str | None:
    """What an error of torch's loader means, in one line; None if it is something else."""
    text = f"{error} {error.__cause__ or ''}"  # where torch raises it a second time, the first one has the exit code
    code = re.search(r"DataLoader worker.* exit code (\d+)", text)
    reason = _reason(text) or (int(code[1]) if code else None)
    if reason in KNOWN:
        return KNOWN[reason]
    if "DataLoader timed out" in text:
        return "no batch came in time: a loader process is stopped or stuck, or the image folder does not answer"
    if "DataLoader worker" in text or isinstance(error, EOFError | ConnectionError):
        killed = re.search(r"killed by signal: ([^.]*)", text)
        how = f"was killed ({killed[1].strip()})" if killed else "has ended"
        return f"a loader process {how}, perhaps by the out-of-memory killer: try fewer workers"
    return None
