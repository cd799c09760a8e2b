"""`label --ray`: the same predictor as an actor pool in Ray Data (extra `ray`); a row is a shard.

Every node sees the images and the run's folder under the same paths.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundingdino.cli import label, loading
from groundingdino.inference.remote import is_uri

if TYPE_CHECKING:
    from groundingdino.inference.label_store import LabelRun


class Labeller:
    """An actor: loads the model once, labels shard after shard."""

    def __init__(self, arguments: label.Arguments, checkpoint: Path) -> None:
        from groundingdino.inference.label_store import LabelRun

        self._job = label.understood(arguments)
        self._run = LabelRun(self._job.out)
        self._predictor = loading.load_predictor(checkpoint, arguments.device, arguments.precision, arguments.scale)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The numbers of the shards, which are done now."""
        label.work(self._predictor, self._run, self._job, lambda count: None, batch["id"].tolist())
        return batch


def everywhere(arguments: label.Arguments) -> label.Arguments:
    """With paths that do not depend on the current folder."""
    assert arguments.out is not None and arguments.names is not None
    names = os.path.abspath(arguments.names) if os.path.isfile(arguments.names) else arguments.names
    images = tuple(source if is_uri(source) else str(Path(source).absolute()) for source in arguments.images)
    return replace(arguments, images=images, names=names, out=arguments.out.absolute(), ray=None)


def label_on_ray(
    arguments: label.Arguments, checkpoint: Path, run: "LabelRun", progress: Callable[[int], object]
) -> None:
    """Label the run's waiting shards on a Ray cluster; each model has an accelerator, if there are any."""
    import ray

    address = None if arguments.ray == "local" else arguments.ray
    ray.init(address, log_to_driver=False, ignore_reinit_error=True)
    try:
        had = ray.cluster_resources()
        needs: dict[str, Any] = {"num_cpus": 1}
        if arguments.device != "cpu" and had.get("GPU"):
            needs["num_gpus"] = 1
        elif arguments.device != "cpu" and had.get("NPU"):
            needs["resources"] = {"NPU": 1}
        waiting = [{"id": number} for number in range(len(run.manifest.offsets)) if not run.is_done(number)]
        shards = ray.data.from_items(waiting, override_num_blocks=len(waiting)).map_batches(
            Labeller,
            fn_constructor_args=(everywhere(arguments), checkpoint.absolute() if checkpoint.exists() else checkpoint),
            batch_size=1,
            concurrency=min(arguments.ray_workers, len(waiting)),
            **needs,
        )
        for _ in shards.iter_rows():
            progress(min(run.manifest.shard_size, run.manifest.images))
    finally:
        ray.shutdown()
