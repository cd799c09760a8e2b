"""Two ranks on the simulated NPU, over HCCL: torchrun --nproc_per_node=2 tests/npu_simulator/ranks.py FOLDER

First the gradients of one step against the average that one process computes, then `train.py quickstart`.
No object crosses the device meanwhile.
"""

import dataclasses
import functools
import os
import runpy
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))
from npu_simulator import simulator

simulator.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from gradient_ranks import NO_DROPOUT, cloned, part_of, whole_batch  # noqa: E402
from training_runs import small_config  # noqa: E402

from groundingdino.data import synthetic_refcoco  # noqa: E402
from groundingdino.model import build_detector  # noqa: E402
from groundingdino.runtime import distributed  # noqa: E402
from groundingdino.structures import to_device  # noqa: E402
from groundingdino.training.criterion import Criterion  # noqa: E402
from groundingdino.training.learner import Learner  # noqa: E402

IMAGES = 2


def float32(record):
    """Every float64 tensor of a record in float32."""
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    wide = {n: v.float() for n, v in values.items() if isinstance(v, torch.Tensor) and v.dtype == torch.float64}
    return dataclasses.replace(record, **wide)


def gradients(device: torch.device, images: range) -> dict[str, torch.Tensor]:
    """Every parameter's gradient for these images, one micro-batch each, exchanged with the other ranks."""
    torch.manual_seed(0)
    model = build_detector(NO_DROPOUT)
    config = small_config(Path("unused"), Path("unused"), ema_decay=0.0)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, clip_norm=0.0))
    learner = Learner(model, Criterion(), config, device)
    whole, noise = whole_batch((1,) * IMAGES)
    batches, draws, kept = [], [], {}
    for i in images:
        parts = {name: float32(part_of(getattr(whole, name), i, i + 1)) for name in ("images", "text", "targets")}
        batches.append(dataclasses.replace(whole, **parts))
        draws.append(to_device(float32(part_of(noise, i, i + 1)), device))
    with mock.patch.object(learner.optimizer, "zero_grad", lambda set_to_none: kept.update(cloned(model))):
        learner.step(batches, 1.0, draws)
    return {name: gradient.cpu() for name, gradient in kept.items()}


def main(folder: Path) -> None:
    world = distributed.init("npu", timeout_minutes=3)
    assert world.size == IMAGES and world.device == torch.device("npu", world.rank)
    together = gradients(world.device, range(world.rank, world.rank + 1))
    with mock.patch.object(distributed, "world_size", lambda: 1):
        alone = gradients(world.device, range(IMAGES))
    assert together.keys() == alone.keys() and len(alone) > 150
    for name, expected in alone.items():
        assert expected.abs().max() > 0 or torch.equal(expected, together[name])
        torch.testing.assert_close(together[name], expected, rtol=1e-5, atol=1e-6, msg=name)
    objects_stay_on_the_host(world)
    total = distributed.all_reduce_sum(torch.tensor([1.0, world.rank], device=world.device))
    assert total.tolist() == [2, 1]
    if distributed.is_main():
        print("gradients equal those of one process", flush=True)

    scenes = functools.partial(synthetic_refcoco.SyntheticConfig, train_scenes=4, heldout_scenes=1)
    synthetic_refcoco.SyntheticConfig = scenes
    paths = ["--run-dir", str(folder / "run"), "--data.root", str(folder / "data")]
    small = ["--epochs", "1", "--data.batch-size", "2", "--data.workers", "0", "--log-every", "1", "--pictures", "1"]
    half = ["--precision", "bf16", "--activation-checkpointing"]
    sys.argv = ["train.py", "quickstart", "--device", "npu", *paths, *small, *half]
    pickled = dist.distributed_c10d._object_to_tensor
    with mock.patch.object(dist.distributed_c10d, "_object_to_tensor", side_effect=pickled) as spy:
        try:
            runpy.run_path(str(Path(__file__).parent.parent.parent / "train.py"), run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code
    to = Counter(str(call.args[1]) for call in spy.call_args_list)
    assert to.keys() == {"cpu"} and to["cpu"] > 5, to


def objects_stay_on_the_host(world: distributed.World) -> None:
    """The runtime sees no copy and no synchronisation, and HCCL no call, while objects and barriers are exchanged."""
    torch.npu.synchronize()
    before = simulator.counters(), simulator.collectives()
    assert distributed.gather_objects({"rank": world.rank}) == [{"rank": 0}, {"rank": 1}]
    assert distributed.broadcast_object(f"from {world.rank}") == "from 0"
    assert distributed.highest(world.rank) == 1
    distributed.barrier()
    assert (simulator.counters(), simulator.collectives()) == before


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
