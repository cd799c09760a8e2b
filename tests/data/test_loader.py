"""The order of training samples: shuffled, grouped, shared out among ranks, and continued where it stopped."""

import json
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from groundingdino.data import (
    Augmentation,
    Batch,
    BatchPlan,
    Draw,
    GroundingDataset,
    LoaderOptions,
    Sample,
    TrainingSource,
    TrainLoader,
    affordable_workers,
    build_train_loader,
    load_odvg,
)
from groundingdino.runtime.loader_process import loader_problem

REPOSITORY = Path(__file__).parent.parent.parent
PORTRAIT = np.random.default_rng(0).random(37) < 0.3


def batches(plan: BatchPlan, epoch: int = 0) -> list[list[int]]:
    plan.epoch = epoch
    return [[draw.index for draw in batch] for batch in plan]


class TestPlan:
    def test_an_epoch_shows_every_sample_once_in_an_order_of_its_own(self):
        plan = BatchPlan([PORTRAIT[:36]], [1.0], batch_size=4, seed=5)
        first, second = batches(plan, 0), batches(plan, 1)
        assert len(first) == len(plan) == 9
        assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(36))
        assert first != second and sum(first, []) != list(range(36))
        assert first == batches(BatchPlan([PORTRAIT[:36]], [1.0], 4, seed=5), 0)
        assert first != batches(BatchPlan([PORTRAIT[:36]], [1.0], 4, seed=6), 0)

    def test_only_the_last_batches_mix_portrait_and_landscape(self):
        plan = BatchPlan([PORTRAIT], [1.0], batch_size=4)
        mixed = [number for number, batch in enumerate(batches(plan)) if len(set(PORTRAIT[batch])) == 2]
        assert len(mixed) <= 2 and all(number >= len(plan) - 2 for number in mixed)
        kinds = [bool(PORTRAIT[batch[0]]) for batch in batches(plan)[:-2]]
        assert len(set(kinds)) == 2 and kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)

    @pytest.mark.parametrize("world_size", [1, 2, 3, 8])
    def test_ranks_get_equally_many_full_batches_that_together_hold_everything(self, world_size: int):
        plans = [BatchPlan([PORTRAIT], [1.0], 2, (rank, world_size)) for rank in range(world_size)]
        shares = [batches(plan) for plan in plans]
        assert {len(share) for share in shares} == {len(plans[0])}
        everything = Counter(index for share in shares for batch in share for index in batch)
        assert set(everything) == set(range(37))
        assert sum(everything.values()) - 37 < 2 * world_size
        assert all(len(batch) == 2 for share in shares for batch in share)

    def test_more_ranks_than_samples_still_get_a_batch_each(self):
        shares = [batches(BatchPlan([PORTRAIT[:3]], [1.0], 2, (rank, 4))) for rank in range(4)]
        assert [len(share) for share in shares] == [1, 1, 1, 1]
        assert set(sum(sum(shares, []), [])) == {0, 1, 2}

    def test_weights_say_how_often_an_epoch_shows_each_entry_of_a_source(self):
        flags = np.zeros(10, dtype=bool)
        plan = BatchPlan([flags, flags, flags], [1.0, 2.5, 0.3], batch_size=1)
        counts = Counter(sum(batches(plan), []))
        per_source = [[counts[index] for index in range(first, first + 10)] for first in (0, 10, 20)]
        assert per_source[0] == [1] * 10
        assert sorted(per_source[1]) == [2] * 5 + [3] * 5
        assert sorted(per_source[2]) == [0] * 7 + [1] * 3
        halves = [frozenset(i for i in sum(batches(plan, epoch), []) if i >= 20) for epoch in range(5)]
        assert len(set(halves)) > 1

    def test_repeats_within_an_epoch_are_told_apart(self):
        plan = BatchPlan([PORTRAIT[:5]], [3.0], batch_size=2, shard=(0, 2))
        draws = [
            draw for rank in range(2) for batch in BatchPlan([PORTRAIT[:5]], [3.0], 2, (rank, 2)) for draw in batch
        ]
        assert len(plan) == 4 and len(draws) == 16
        assert len(set(draws)) == 16

    def test_a_million_entries_are_planned_without_losing_one(self):
        plan = BatchPlan([np.random.default_rng(0).random(1_000_000) < 0.4], [1.0], batch_size=2, shard=(0, 8))
        indices, _ = plan.plan(0)
        assert indices.shape == (500_000, 2) and len(np.unique(indices)) == 1_000_000

    @pytest.mark.parametrize(
        ("weights", "batch_size", "message"),
        [([1.0, 1.0], 2, "one weight"), ([-1.0], 2, "negative"), ([0.0], 2, "all 0"), ([1.0], 0, "batch_size")],
    )
    def test_settings_that_make_no_sense_are_refused(self, weights: list[float], batch_size: int, message: str):
        with pytest.raises(ValueError, match=message):
            BatchPlan([PORTRAIT], weights, batch_size)


AUGMENTATION = Augmentation((24, 32, 40), 64, short_sides_before_crop=(30, 36), crop_sides=(20, 32))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TrainingSource:
    folder = tmp_path_factory.mktemp("images")
    lines = []
    for number in range(11):
        size = (40, 30) if number % 3 else (30, 40)
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{number}.png")
        regions = [{"bbox": [1, 1, 20, 20], "phrase": "cup"}]
        content = {"caption": f"cup {number}", "regions": regions}
        lines.append({"filename": f"{number}.png", "width": size[0], "height": size[1], "grounding": content})
    (folder / "train.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return TrainingSource(load_odvg(folder / "train.json"), folder)


def loader(source: TrainingSource, workers: int = 0, seed: int = 0, **shard: int) -> TrainLoader:
    dataset = GroundingDataset([source], AUGMENTATION, seed)
    return build_train_loader(dataset, LoaderOptions(2, workers), **shard)


def key(batch: Batch) -> tuple:
    return tuple(info.sample_id for info in batch.info), batch.images.pixels.double().sum().item(), batch.targets.counts


class Drawing(GroundingDataset):
    """Samples that bring along what the global generators of their worker have drawn."""

    def __getitem__(self, draw: Draw) -> Sample:
        return replace(super().__getitem__(draw), problems=(str(np.random.random()), str(random.random())))


# Loads with one worker, which sends itself a signal, and prints what is to be said about it.
WORKER_PROGRAM = """
import multiprocessing, os, signal, sys
from pathlib import Path
from groundingdino.data import GroundingDataset, LoaderOptions, TrainingSource
from groundingdino.data import build_train_loader, load_odvg

from groundingdino.runtime.loader_process import loader_problem

class Signalled(GroundingDataset):
    def __getitem__(self, draw):
        os.kill(os.getpid(), signal.Signals[sys.argv[2]])
        return super().__getitem__(draw)

folder = Path(sys.argv[1])
loader = build_train_loader(
    Signalled([TrainingSource(load_odvg(folder / "train.json"), folder)]), LoaderOptions(2, workers=1, timeout=3)
)
try:
    list(loader)
except (RuntimeError, OSError) as error:
    print(loader_problem(error) or error, flush=True)
for child in multiprocessing.active_children():
    child.kill()
os._exit(0)
"""


def three_epochs(of: TrainLoader) -> Iterator[Batch]:
    while of.epoch < 3:
        yield from of


class TestLoader:
    def test_the_batches_do_not_depend_on_the_number_of_workers(self, source: TrainingSource):
        alone = [key(batch) for batch in three_epochs(loader(source))]
        assert len(alone) == 18
        assert alone == [key(batch) for batch in three_epochs(loader(source, workers=2))]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_loader_that_continues_yields_what_would_have_come_next(self, source: TrainingSource, workers: int):
        whole, states = [], []
        straight = loader(source)
        for batch in three_epochs(straight):
            whole.append(key(batch))
            states.append(straight.state_dict())
        for stop in (0, 3, 5, 8) if workers else range(17):
            resumed = loader(source, workers)
            resumed.load_state_dict(json.loads(json.dumps(states[stop])))
            assert [key(batch) for batch in three_epochs(resumed)] == whole[stop + 1 :]

    def test_the_global_random_state_is_not_touched(self, source: TrainingSource):
        before = torch.get_rng_state()
        numpy_before = pickle.dumps(np.random.get_state())
        list(loader(source))
        assert torch.equal(before, torch.get_rng_state())
        assert numpy_before == pickle.dumps(np.random.get_state())

    def test_detection_and_grounding_data_mix_by_their_weights(self, source: TrainingSource, tmp_path: Path):
        instances = [{"bbox": [1, 1, 20, 20], "label": 0}]
        line = {"filename": "0.png", "width": 30, "height": 40, "detection": {"instances": instances}}
        (tmp_path / "od.json").write_text((json.dumps(line) + "\n") * 4)
        detection = TrainingSource(
            load_odvg(tmp_path / "od.json", {0: "cup", 1: "dog"}), source.images, "things", weight=0.5
        )
        dataset = GroundingDataset([source, detection], AUGMENTATION)
        mixed = build_train_loader(dataset, LoaderOptions(1))
        names = Counter((info.dataset_name, info.caption.count(". ")) for batch in mixed for info in batch.info)
        assert sum(count for (name, _), count in names.items() if name == "refcoco") == 11
        assert sum(count for (name, _), count in names.items() if name == "things") == 2
        whole = [key(batch) for batch in build_train_loader(dataset, LoaderOptions(1, workers=1))]
        assert whole == [key(batch) for batch in build_train_loader(dataset, LoaderOptions(1))]

    def test_workers_of_different_ranks_have_global_generators_of_their_own(self, source: TrainingSource):
        drawn = []
        for seed, rank in ((0, 0), (0, 1), (1, 0)):
            loaded = build_train_loader(
                Drawing([source], AUGMENTATION, seed), LoaderOptions(2, 2), rank=rank, world_size=2
            )
            drawn += [number for batch in loaded for number in batch.problems]
        assert len(drawn) == 3 * 3 * 2 * 2 and len(set(drawn)) == len(drawn)

    def test_another_number_of_ranks_continues_at_the_same_sample(self, source: TrainingSource):
        single = loader(source)
        iterator = iter(single)
        for _ in range(4):
            next(iterator)
        resumed = loader(source, rank=1, world_size=2)
        resumed.load_state_dict(single.state_dict())
        assert resumed.done == 2 and len(resumed) == 3

    def test_a_state_of_another_seed_is_refused(self, source: TrainingSource):
        with pytest.raises(ValueError, match="seed 0, this run 1"):
            loader(source, seed=1).load_state_dict(loader(source).state_dict())

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_bad_sample_stops_the_loop_with_one_line(self, source: TrainingSource, tmp_path: Path, workers: int):
        elsewhere = TrainingSource(source.annotations, tmp_path)
        with pytest.raises(ValueError) as caught:
            list(loader(elsewhere, workers))
        assert "no such file" in str(caught.value) and "\n" not in str(caught.value)

    def test_a_batch_can_be_pinned_by_the_loader(self, source: TrainingSource, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 0)
        batch = next(iter(loader(source)))
        pinned = batch.pin_memory()
        assert pinned.images.pixels is not batch.images.pixels and pinned.info == batch.info
        assert torch.equal(pinned.targets.positive_map, batch.targets.positive_map.long())

    @pytest.mark.parametrize(
        ("sent", "message"), [("SIGKILL", "out-of-memory killer"), ("SIGSTOP", "no batch came in time")]
    )
    def test_a_killed_or_stopped_worker_is_one_line(self, source: TrainingSource, sent: str, message: str):
        # In a program of its own: torch raises wherever the training process is just then.
        command = [sys.executable, "-c", WORKER_PROGRAM, str(source.images), sent]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
        (line,) = found.stdout.splitlines()
        assert message in line, found.stderr

    def test_other_errors_are_not_taken_for_a_workers(self):
        assert loader_problem(RuntimeError("shapes do not match")) is None

    def test_small_shared_memory_means_fewer_workers(self, caplog: pytest.LogCaptureFixture):
        assert affordable_workers(4, batch_bytes=10, free=80) == 4 and not caplog.messages
        assert affordable_workers(4, batch_bytes=10, free=79) == 3
        assert affordable_workers(4, batch_bytes=2**20, free=2**20) == 0
        assert "/dev/shm has 1 MiB free, 4 loader processes may need 8 MiB: using 0" in caplog.messages[-1]
