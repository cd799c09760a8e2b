"""The training loader: batches of one rank, in an order that can be continued in the middle of an epoch."""

import ctypes
import logging
import os
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from groundingdino.data.batch import Batch, Padding, Sample, collate
from groundingdino.data.dataset import BadSampleError, GroundingDataset
from groundingdino.data.sampler import BatchPlan, Draw
from groundingdino.runtime.loader_process import SHARED_MEMORY, batches, end_with_a_lost_batch

PREFETCHED = 2  # batches that torch's loader keeps ready for each process
TERMINATION_DELAY = 30  # seconds that a loader process lives on after SIGTERM, for the last step and its state

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoaderOptions:
    """How one process loads its shard."""

    batch_size: int  # images per process
    workers: int = 0  # loader processes; 0 loads in this process
    pin_memory: bool = False  # page-locked batches, for copies that do not block
    timeout: float = 0.0  # seconds to wait for a loader process; 0 waits for ever
    padding: Padding = Padding()
    context: BaseContext | None = None  # how loader processes are started, see `devices.loader_context`


class TrainLoader:
    """Yields one epoch's `Batch`es per iteration, then moves on to the next epoch.

    `state_dict` taken in the loop counts the batch just yielded as done; a loader with that state loaded yields what
    would have come next, bit-equal, also with another number of workers. With another number of ranks or another
    batch size it continues at the same sample (rounded down to a whole step). The global random state is not touched.
    """

    def __init__(self, dataset: GroundingDataset, plan: BatchPlan, options: LoaderOptions):
        self.plan = plan
        self.dataset = dataset
        self._done = 0  # batches of this epoch that were yielded
        self._loader = DataLoader(
            _MessagesInsteadOfErrors(dataset),  # type: ignore[arg-type]
            batch_sampler=plan,
            num_workers=options.workers,
            collate_fn=partial(_collate, max_tokens=dataset.limits.max_tokens, padding=options.padding),
            pin_memory=options.pin_memory,
            persistent_workers=options.workers > 0,
            timeout=options.timeout if options.workers else 0,
            multiprocessing_context=options.context,
            generator=torch.Generator().manual_seed(plan.seed),
            worker_init_fn=partial(_start_worker, seed=plan.seed, rank=plan.rank),
        )

    @property
    def epoch(self) -> int:
        """The epoch that is under way, from 0."""
        return self.plan.epoch

    @property
    def done(self) -> int:
        """Batches of this epoch that were yielded."""
        return self._done

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        self.plan.start = self._done
        for batch in batches(self._loader):
            if isinstance(batch, str):
                raise ValueError(batch)
            self._done += 1
            yield batch
        self.plan.epoch += 1
        self._done = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint, equal on every rank."""
        samples = self._done * self.plan.world_size * self.plan.batch_size
        return {"epoch": self.plan.epoch, "samples": samples, "seed": self.plan.seed, "sizes": self.plan.sizes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state` was taken.

        ValueError if the state is of another seed, or of training files with other numbers of entries.
        """
        if state["seed"] != self.plan.seed:
            raise ValueError(f"the checkpoint's data order has seed {state['seed']}, this run {self.plan.seed}")
        if tuple(state["sizes"]) != self.plan.sizes:
            raise ValueError(
                f"the training files hold {list(self.plan.sizes)} entries, {list(state['sizes'])} when the checkpoint "
                "was saved: put the files back, or start a run of its own with --init-from"
            )
        self.plan.epoch = state["epoch"]
        self._done = state["samples"] // (self.plan.world_size * self.plan.batch_size)
        if self._done >= len(self.plan):
            self.plan.epoch, self._done = self.plan.epoch + 1, 0


def build_train_loader(
    dataset: GroundingDataset, options: LoaderOptions, *, rank: int = 0, world_size: int = 1
) -> TrainLoader:
    """The loader of one rank's shard. `dataset` is the same on every rank, and its seed orders the samples.

    A bad sample ends the iteration with ValueError, naming file and line, unless the dataset skips it.
    """
    portrait = [source.annotations.portrait for source in dataset.sources]
    weights = [source.weight for source in dataset.sources]
    repeats = [source.repeats() for source in dataset.sources]
    plan = BatchPlan(portrait, weights, options.batch_size, (rank, world_size), dataset.seed, repeats)
    return TrainLoader(dataset, plan, options)


def affordable_workers(workers: int, batch_bytes: int, free: int | None = None) -> int:
    """As many of `workers` as the shared memory has room for: each keeps up to `PREFETCHED` batches there.

    Args:
        workers: loader processes that are wanted.
        batch_bytes: size of the largest batch.
        free: bytes of shared memory; None looks.
    """
    if free is None:
        try:
            status = os.statvfs(SHARED_MEMORY)
        except OSError:  # not on Linux: batches travel another way
            return workers
        free = status.f_bavail * status.f_frsize
    affordable = min(workers, free // (PREFETCHED * batch_bytes))
    if affordable < workers:
        logger.warning(
            f"{SHARED_MEMORY} has {free >> 20} MiB free, {workers} loader processes may need "
            f"{workers * PREFETCHED * batch_bytes >> 20} MiB: using {affordable}; a container gets more with --shm-size"
        )
    return affordable


class _MessagesInsteadOfErrors(Dataset[Sample | str]):
    """Bad samples come out as their message: an error that crosses processes would arrive as a page of traceback."""

    def __init__(self, dataset: GroundingDataset):
        self.dataset = dataset

    def __getitem__(self, draw: Draw) -> Sample | str:
        try:
            return self.dataset[draw]
        except BadSampleError as error:
            return str(error)


def _collate(samples: Sequence[Sample | str], max_tokens: int, padding: Padding) -> Batch | str:
    message = next((sample for sample in samples if isinstance(sample, str)), None)
    if message is not None:
        return message
    return collate(samples, max_tokens, padding)  # type: ignore[arg-type]


def _start_worker(worker: int, seed: int, rank: int) -> None:
    """Samples bring their own generators; the seeds are for code that draws from the global ones all the same."""
    # The training process decides about signals that every process of a job gets; torch ends workers without it.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(TERMINATION_DELAY))
    end_with_a_lost_batch()
    words = np.random.SeedSequence((seed, rank, worker, torch.initial_seed())).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    if sys.platform == "linux":
        # A million entries leave the parent's allocator with free pages, which it will write to again; a worker that
        # has inherited them would then keep 10 to 80 MB of copies.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
