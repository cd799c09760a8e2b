"""Against forgetting: other data that a model is evaluated on before and after, and data that it is shown again."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from groundingdino.config import DataConfig, TrainConfig
from groundingdino.data import load_training
from groundingdino.data.formats import registry
from groundingdino.data.formats.writers import write_coco
from groundingdino.evaluation import report
from groundingdino.model import GroundingDINO
from groundingdino.runtime import distributed
from groundingdino.runtime.distributed import World
from groundingdino.runtime.files import write_text
from groundingdino.training.setup import initial_model
from groundingdino.training.validation import Assessor

BEFORE, AFTER = "retained_before.json", "retained_after.json"  # in the run folder


@dataclass(frozen=True)
class Retained:
    """Data that a model is evaluated on before and after it is trained on others."""

    file: Path  # annotations that `validation.load_protocol` reads
    images: Path  # their folder


def retained_data(source: Path, folder: Path) -> Retained:
    """Annotations of any format with names of their own; detection data are written as COCO's json into `folder`.

    ValueError for a file that is missing, damaged, or of no known format.
    """
    reading = registry.read(source)
    if reading.format in ("coco", "lvis", "mdetr"):
        return Retained(source.absolute(), reading.images.absolute())
    file = folder / "retain.json"
    write_coco({"retain": reading}, file, "leave")
    return Retained(file.absolute(), reading.images.absolute())


class Retention:
    """The figures on retained data, before and after; each is a report for `groundingdino evaluate retention`."""

    def __init__(self, data: Retained, config: TrainConfig, world: World) -> None:
        """Evaluates the model that the run starts from; a resumed run has done so already."""
        splits = (("retain", str(data.file)),)
        evaluated = replace(config.data, evaluation=splits, evaluation_image_dirs=(str(data.images),))
        self._config, self._file = replace(config, data=evaluated, pictures=0), data.file
        place = config.run_dir / BEFORE
        known = distributed.broadcast_object(report.read_report(place) if place.exists() else None)
        self.before: dict[str, Any] = known or self._measure(initial_model(config).to(world.device).eval(), place)

    def after(self, model: GroundingDINO) -> tuple[dict[str, float], list[str]]:
        """The figures of the trained model, and a table of both in percent."""
        found = self._measure(model, self._config.run_dir / AFTER)
        return found["figures"], report.comparison([self.before], [found])

    def _measure(self, model: GroundingDINO, place: Path) -> dict[str, Any]:
        data = self._config.data
        found = {
            "protocol_name": "retain",
            "split": self._file.stem,
            "protocol": {
                "annotations": str(self._file),
                "image": f"into {data.evaluation_side}x{data.evaluation_long_side} pixels",
                "arithmetic": self._config.precision,
            },
            "figures": Assessor(self._config).assess(model).figures["retain"],
        }
        if distributed.is_main():
            place.parent.mkdir(parents=True, exist_ok=True)
            write_text(place, json.dumps(found, indent=1) + "\n")
        return found


def with_replay(data: DataConfig, replay: str, own: int) -> tuple[DataConfig, int]:
    """Mix other training data in.

    Args:
        data: with one training file.
        replay: "FILE:0.2" for a fifth of each epoch; any format, captions or detection.
        own: entries of the training file.
    Returns:
        The config, and the entries that an epoch shows.
    Raises:
        ValueError: not of this form, or a file that cannot be trained on.
    """
    name, _, text = replay.rpartition(":")
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not name or not 0 < share < 1:
        raise ValueError(f"--replay {replay}: give FILE:SHARE, such as goldg.jsonl:0.2 for a fifth of each epoch")
    path = Path(name).absolute()
    reading = registry.read(path)
    others = len(load_training(path, None, data.on_bad_sample))
    shown = round(own / (1 - share))
    mixed = replace(
        data,
        train_files=(*data.train_files, str(path)),
        image_dirs=(*data.image_dirs, str(reading.images.absolute())),
        sampling_weights=(1.0, (shown - own) / others),
        label_maps=(*(data.label_maps or ("",)), ""),  # the second one lies beside its file
    )
    return mixed, shown
