"""The training loader: batches of one rank, in an order that can be continued in the middle of an epoch."""

import ctypes
import random
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from groundingdino.data.annotations import OnBadSample
from groundingdino.data.augmentation import Augmentation
from groundingdino.data.batch import Batch, Sample, collate
from groundingdino.data.dataset import BadSampleError, GroundingDataset, SampleLimits, TrainingSource
from groundingdino.data.sampler import BatchPlan, Draw


class TrainLoader:
    """Yields one epoch's `Batch`es per iteration, then moves on to the next epoch.

    `state_dict` taken in the loop counts the batch just yielded as done; a loader with that state loaded yields what
    would have come next, bit-equal, also with another number of workers. With another number of ranks or another
    batch size it continues at the same sample (rounded down to a whole step). The global random state is not touched.
    """

    def __init__(self, dataset: GroundingDataset, plan: BatchPlan, workers: int, pin_memory: bool):
        self.plan = plan
        self._done = 0  # batches of this epoch that were yielded
        self._loader = DataLoader(
            _MessagesInsteadOfErrors(dataset),  # type: ignore[arg-type]
            batch_sampler=plan,
            num_workers=workers,
            collate_fn=partial(_collate, max_tokens=dataset.limits.max_tokens),
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
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
        for batch in self._loader:
            if isinstance(batch, str):
                raise ValueError(batch)
            self._done += 1
            yield batch
        self.plan.epoch += 1
        self._done = 0

    def state_dict(self) -> dict[str, int]:
        """Plain numbers for a checkpoint; equal on every rank."""
        samples = self._done * self.plan.world_size * self.plan.batch_size
        return {"epoch": self.plan.epoch, "samples": samples, "seed": self.plan.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state` was taken. ValueError if the state is of another seed."""
        if state["seed"] != self.plan.seed:
            raise ValueError(f"the checkpoint's data order has seed {state['seed']}, this run {self.plan.seed}")
        self.plan.epoch = state["epoch"]
        self._done = state["samples"] // (self.plan.world_size * self.plan.batch_size)
        if self._done >= len(self.plan):
            self.plan.epoch, self._done = self.plan.epoch + 1, 0


def build_train_loader(
    sources: Sequence[TrainingSource],
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    workers: int = 0,
    augmentation: Augmentation | None = None,
    on_bad_sample: OnBadSample = "stop",
    limits: SampleLimits | None = None,
    pin_memory: bool = False,
) -> TrainLoader:
    """The loader of one rank.

    Args:
        sources: annotation files with their image folders and weights.
        batch_size: images of one rank's batch.
        seed: of the order and of all augmentation; equal on every rank.
        workers: loader processes; 0 loads in this process.
        augmentation: default is the RefCOCO recipe.
        on_bad_sample: "stop" raises ValueError, naming file and line; "skip" puts the next good sample in its place and
            notes it in `Batch.problems`.
        limits: the model's sizes.
    """
    dataset = GroundingDataset(sources, augmentation, seed, on_bad_sample, limits)
    portrait = [source.annotations.portrait for source in sources]
    weights = [source.weight for source in sources]
    plan = BatchPlan(portrait, weights, batch_size, rank, world_size, seed)
    return TrainLoader(dataset, plan, workers, pin_memory)


class _MessagesInsteadOfErrors(Dataset[Sample | str]):
    """Bad samples come out as their message: an error that crosses processes would arrive as a page of traceback."""

    def __init__(self, dataset: GroundingDataset):
        self.dataset = dataset

    def __getitem__(self, draw: Draw) -> Sample | str:
        try:
            return self.dataset[draw]
        except BadSampleError as error:
            return str(error)


def _collate(samples: Sequence[Sample | str], max_tokens: int) -> Batch | str:
    message = next((sample for sample in samples if isinstance(sample, str)), None)
    if message is not None:
        return message
    return collate(samples, max_tokens)  # type: ignore[arg-type]


def _start_worker(worker: int, seed: int, rank: int) -> None:
    """Samples bring their own generators; the seeds are for code that draws from the global ones all the same."""
    words = np.random.SeedSequence((seed, rank, worker, torch.initial_seed())).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    if sys.platform == "linux":
        # A million entries leave the parent's allocator with free pages, which it will write to again; a worker that
        # has inherited them would then keep 10 to 80 MB of copies.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
