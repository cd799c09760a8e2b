"""Which samples make which batch of which rank: a plan for each epoch that depends on the seed alone.

The plan is the same on every rank and for any number of loader workers, so a run continues in the middle of an epoch
by skipping the batches it has seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


def _repeated(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entry numbers, each as often as `times` says, and which repetition each is."""
    entries = np.repeat(np.arange(len(times)), times)
    first = np.repeat(np.cumsum(times) - times, times)
    return entries, np.arange(len(entries)) - first


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample of an epoch; with the seed it decides everything random about the sample."""

    index: int  # into the data set
    epoch: int
    copy: int  # 0, 1, ... where an epoch holds the same index several times


class BatchPlan:
    """A batch sampler for `torch.utils.data.DataLoader`: shuffled, by aspect ratio, for one rank.

    Portrait and landscape images never share a batch but for the last few, as with mmdet's AspectRatioBatchSampler
    (there each rank groups its own shard; here the whole epoch is grouped, then sharded). Every rank gets equally
    many batches of equal size: the end is filled up with samples that then occur once more.

    Args:
        portrait: per source, (n,) bool, whether an image is higher than wide.
        weights: per source, how many times an epoch shows each of its entries: 1 each once, 0.5 a random half, 2 each
            twice.
        batch_size: samples of one rank's batch.
        shard: rank of this process, and number of processes.
        seed: of the shuffling.
        repeats: per source, (n,) how many times its entries are shown, before `weights`; None for each once.
    """

    def __init__(
        self,
        portrait: Sequence[np.ndarray],
        weights: Sequence[float],
        batch_size: int,
        shard: tuple[int, int] = (0, 1),
        seed: int = 0,
        repeats: Sequence[np.ndarray | None] | None = None,
    ):
        if len(portrait) != len(weights) or not portrait:
            raise ValueError(f"expected one weight for each of the {len(portrait)} sources, got {len(weights)}")
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"source weights must not be negative and not all 0, got {list(weights)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = shard
        self.epoch, self.start = 0, 0  # what the next iteration yields: `epoch` from batch `start` of this rank
        self._portrait = np.concatenate(portrait)
        self.sizes, self._weights = tuple(len(flags) for flags in portrait), list(weights)
        repeats = repeats or [None] * len(weights)
        self._entries = [
            (np.arange(size), np.zeros(size, np.int64)) if times is None else _repeated(times)
            for size, times in zip(self.sizes, repeats, strict=True)
        ]
        counts = [round(len(e[0]) * weight) for e, weight in zip(self._entries, weights, strict=True)]
        self._num_batches = max(1, -(-sum(counts) // (batch_size * self.world_size)))

    def __len__(self) -> int:
        """Batches of a whole epoch on each rank."""
        return self._num_batches

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = self.epoch
        indices, copies = self.plan(epoch)
        for number in range(self.start, len(self)):
            batch = number * self.world_size + self.rank
            yield [Draw(int(i), epoch, int(c)) for i, c in zip(indices[batch], copies[batch], strict=True)]

    def plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices and copy numbers of all ranks' batches of an epoch, (batches, batch_size) each; rank r has every
        `world_size`-th batch from r."""
        generator = np.random.default_rng((self.seed, epoch))
        indices, copies = self._draw(generator)
        order = generator.permutation(len(indices))
        indices, copies = indices[order], copies[order]
        wanted = len(self) * self.world_size * self.batch_size
        rounds = np.arange(wanted) // len(indices)  # past the first: filling up
        filled = np.resize(indices, wanted), np.resize(copies, wanted) + rounds * (copies.max() + 1)
        grouped = self._group(filled[0])
        return filled[0][grouped], filled[1][grouped]

    def _draw(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """What an epoch holds, by weight, in no order yet."""
        indices, copies, first = [], [], 0
        for size, weight, (entries, numbers) in zip(self.sizes, self._weights, self._entries, strict=True):
            count = round(len(entries) * weight)
            whole, rest = divmod(count, len(entries)) if size else (0, 0)
            chosen = [np.arange(len(entries))] * whole
            if rest:
                chosen.append(generator.choice(len(entries), rest, replace=False))
            for copy, part in enumerate(chosen):
                indices.append(entries[part] + first)
                copies.append(numbers[part] + copy * (numbers.max() + 1))
            first += size
        if not indices:
            raise ValueError("the source weights leave no sample in an epoch")
        return np.concatenate(indices), np.concatenate(copies)

    def _group(self, indices: np.ndarray) -> np.ndarray:
        """Positions in `indices`, (batches, batch_size). A batch is emitted when its orientation has enough samples."""
        portrait = self._portrait[indices]
        complete, leftover = [], []
        for orientation in (True, False):
            positions = np.flatnonzero(portrait == orientation)
            whole = len(positions) // self.batch_size * self.batch_size
            complete.append(positions[:whole].reshape(-1, self.batch_size))
            leftover.append(positions[whole:])
        batches = np.concatenate(complete)
        batches = batches[np.argsort(batches[:, -1])]
        return np.concatenate([batches, np.concatenate(leftover).reshape(-1, self.batch_size)])
