"""`label --ray`: the same predictor as an actor pool in Ray Data (extra `ray`).

A row is an image's reference on the way to the actors and its record on the way back. Actors read the images and the
checkpoint; only this process reads and writes the run's folder.
"""

import socket
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundingdino.cli import label, loading
from groundingdino.inference.label_store import Collector, LabelRun, Record, once

if TYPE_CHECKING:
    import pyarrow

    from groundingdino.inference.engine import EncodedPrompt
    from groundingdino.inference.labelling import LabelOptions
    from groundingdino.inference.predictor import Predictor
    from groundingdino.inference.vocabulary import Vocabulary

STOPS = -1  # position of a record whose problem is not one image's


class Labeller:
    """An actor: loads the model once, labels the images of shard after shard."""

    def __init__(self, weights: tuple[Any, ...], vocabulary: "Vocabulary", options: "LabelOptions") -> None:
        self._weights, self._vocabulary, self._options = weights, vocabulary, options

    def __call__(self, rows: "pyarrow.Table") -> "Iterator[pyarrow.Table]":
        """The records of each batch as soon as they are found; at the end the problem that stops the run, if any."""
        import msgspec
        import pyarrow

        from groundingdino.inference.image_source import ImageRef
        from groundingdino.inference.labelling import find

        def table(records: list[Record]) -> pyarrow.Table:
            return pyarrow.table({"record": [msgspec.msgpack.encode(record) for record in records]})

        images = [msgspec.msgpack.decode(row, type=tuple[int, ImageRef]) for row in rows["image"].to_pylist()]
        try:
            predictor, prompt = self._model
            yield from map(table, find(predictor, images, prompt, self._options))
        except (OSError, ValueError) as error:  # Ray would print its own traces on all sides
            yield table([Record(STOPS, problem=str(error))])

    @cached_property
    def _model(self) -> "tuple[Predictor, EncodedPrompt]":
        from groundingdino.inference.labelling import texts_as_names

        predictor = loading.load_predictor(*self._weights)
        return predictor, predictor.encode_prompt(texts_as_names(self._vocabulary))


def label_on_ray(job: label.Job, checkpoint: Path, run: LabelRun, progress: Callable[[int], object]) -> None:
    """Label the run's waiting images on a Ray cluster; a second process that comes here waits for the first."""
    import ray

    ray.init(_address(job.arguments.ray), log_to_driver=False, ignore_reinit_error=True)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False  # there is one of images
        ray.data.DataContext.get_current().target_max_block_size = 1  # byte: a batch of records is not held back
        once(
            run.shards,
            "ray",
            lambda: run.done_images() == run.manifest.images,
            lambda: _label_waiting(job, checkpoint, LabelRun(job.out), progress),
        )
    finally:
        ray.shutdown()


def _address(given: str | None) -> str | None:
    """As Ray names it. ValueError where nothing listens: Ray itself would try for many minutes."""
    host, _, port = (given or "").rpartition(":")
    if port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise ValueError(f"--ray {given}: nothing listens there ({error.strerror or error})") from error
    return None if given == "local" else given


def _label_waiting(job: label.Job, checkpoint: Path, run: LabelRun, progress: Callable[[int], object]) -> None:
    """Label the images that have no record; each model has an accelerator, if there are any."""
    import msgspec
    import pyarrow
    import ray

    shards = []
    for number in range(len(run.manifest.offsets)):
        if images := () if run.is_done(number) else run.waiting(number):
            shards.append(ray.put(pyarrow.table({"image": [msgspec.msgpack.encode(image) for image in images]})))
        else:
            for shard in run.claimed([number]):  # killed before it was told done
                run.finish(shard)
    if not shards:
        return
    arguments = job.arguments
    place = checkpoint.absolute() if checkpoint.exists() else checkpoint
    weights = (place, arguments.device, arguments.precision, arguments.scale)
    found = ray.data.from_arrow_refs(shards).map_batches(
        Labeller,
        fn_constructor_args=(weights, job.vocabulary, job.options),
        batch_size=None,  # a shard
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(arguments.ray_workers, len(shards))),
        **_needs(arguments.device, ray.cluster_resources()),
    )
    collector = Collector(run)
    with run.heartbeat():
        for rows in found.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in rows["record"].to_pylist():
                record = msgspec.msgpack.decode(row, type=Record)
                if record.position == STOPS:
                    raise OSError(record.problem)
                progress(int(collector.add(record)))


def _needs(device: str, cluster: dict[str, float]) -> dict[str, Any]:
    """What each actor asks Ray for."""
    if device != "cpu" and cluster.get("GPU"):
        return {"num_cpus": 1, "num_gpus": 1}
    if device != "cpu" and cluster.get("NPU"):
        return {"num_cpus": 1, "resources": {"NPU": 1}}
    return {"num_cpus": 1}
