"""Fine-tuning on your own data: from a folder of any format to a predictor and its figures."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from groundingdino.checkpoints import model_file
from groundingdino.config import ModelConfig, TrainConfig, with_settings
from groundingdino.data.formats.record import ReadOptions
from groundingdino.data.prepare import Prepared, prepare
from groundingdino.inference.predictor import Predictor, load_model
from groundingdino.runtime import distributed
from groundingdino.runtime.distributed import World
from groundingdino.training import recipes
from groundingdino.training.callback import Callback
from groundingdino.training.estimate import Estimate
from groundingdino.training.random_state import kept_random_states
from groundingdino.training.recipes import DataSize
from groundingdino.training.retention import Retained, Retention, retained_data, with_replay
from groundingdino.training.run_folder import RunFolder
from groundingdino.training.stop import StopRequest
from groundingdino.training.trainer import FitResult, fit
from groundingdino.training.validation import Assessor, Figures

SHOWN = 5  # problems
SHOWN_CATEGORIES = 20
PURPOSES = {"train": "train on", "val": "validate", "test": "test"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What to fine-tune on what, for how long."""

    data: Path  # file or folder of any format
    start: str | Path | ModelConfig  # weights (a file, a release, a repository of the hub), or sizes for fresh ones
    run_dir: Path
    epochs: int | None = None  # None: as many as suit the size of the data
    steps: int | None = None  # in place of epochs
    text_from: Path | None = None  # folder of a BERT for the text encoder of fresh weights
    names: Mapping[str, str] | None = None  # category -> what to call it
    reading: ReadOptions = ReadOptions()
    resume: str | None = None  # see RunFolder.find_resume
    retain: Path | None = None  # annotations of other data, which the model is evaluated on before and after
    replay: str | None = None  # FILE:SHARE, training data of which each epoch shall have a share


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a fine-tuning run."""

    predictor: Predictor  # with the best checkpoint
    figures: Figures  # of the best checkpoint on the test split; without one, the last ones on the validation split
    run_dir: Path
    files: Mapping[str, Path]  # "best", "final", "metrics", "curves", "pictures"


def finetune(
    data: str | Path,
    model: str | Path | ModelConfig = "mm-gdino-t",
    *,
    run_dir: str | Path = "runs/finetune",
    epochs: int | None = None,
    names: Mapping[str, str] | None = None,
    retain: str | Path | None = None,
    replay: str | None = None,
    settings: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> FinetuneResult:
    """Fine-tune a model on a data set, evaluate it, and return it as a predictor.

    Writes into `run_dir` alone, logs through `logging`, and leaves the process as it was, random generators too.

    Args:
        data: file or folder of any format; `data.prepare.prepare` says how splits are found.
        model: weights to start from (a file, the name of a release, a repository of the hub), or a config for fresh
            ones.
        run_dir: folder of checkpoints, metrics and pictures, which holds no other run.
        epochs: passes over the training data; None takes as many as suit its size.
        names: category -> what to call it in prompts.
        retain: annotations of other data, with names of their own, which the model is evaluated on before and after.
        replay: "FILE:0.2" adds training data, here a fifth of each epoch, which the model shall not forget.
        settings: any other fields of `TrainConfig`, such as {"data.batch_size": 8, "optimizer.lr": 5e-5}.
        callbacks: told how the run goes on.

    Raises:
        ValueError: something that the user can fix, in one line; else what `trainer.fit` raises.
    """
    settings = dict(settings or {})
    world = distributed.init(settings.get("device", "auto"))
    task = Task(
        Path(data),
        model,
        Path(run_dir),
        epochs,
        names=names,
        resume=settings.get("resume"),
        retain=None if retain is None else Path(retain),
        replay=replay,
    )
    prepared, config = plan(task)
    with kept_random_states(world.device):
        result, figures = run(with_settings(config, settings), prepared, world, callbacks=callbacks)
    return FinetuneResult(load_model(best_of(result), str(world.device)), figures, result.run_dir, result.files)


def plan(task: Task) -> tuple[Prepared, TrainConfig]:
    """Prepare the data in the run folder (in the main process), and choose the recipe that fits them."""
    RunFolder(task.run_dir).find_resume(task.resume)  # refuses a folder whose data belong to another run
    prepared = None
    if distributed.is_main():
        folder = task.run_dir / "data"
        folder.mkdir(parents=True, exist_ok=True)
        prepared = prepare(task.data, folder, task.reading, task.names)
        if task.retain is not None:
            retained = retained_data(task.retain, folder)
            files, images = {**prepared.files, "retain": retained.file}, {**prepared.images, "retain": retained.images}
            prepared = replace(prepared, files=files, images=images)
    prepared = distributed.broadcast_object(prepared)
    assert prepared is not None
    size = DataSize(prepared.counts["train"], len(prepared.categories), captions=prepared.label_map is None)
    if isinstance(task.start, ModelConfig):
        config = recipes.from_scratch(size, task.start, task.text_from)
    else:
        config = replace(recipes.finetune(size), init_from=Path(task.start))
    data = replace(
        config.data,
        root=prepared.folder,
        train_files=(prepared.files["train"].name,),
        label_maps=() if prepared.label_map is None else (prepared.label_map.name,),
        image_dirs=(str(prepared.images["train"].absolute()),),
        allow_outside=task.reading.allow_outside,
    )
    if task.replay is not None:
        data, shown = with_replay(data, task.replay, prepared.counts["train"])
        size = replace(size, images=shown)
    config = replace(config, data=data, run_dir=task.run_dir)
    return prepared, _lasting(_evaluated_on("val", config, prepared), size, task)


def _evaluated_on(split: str, config: TrainConfig, prepared: Prepared) -> TrainConfig:
    file, images = prepared.files[split].absolute(), prepared.images[split].absolute()
    data = replace(config.data, evaluation=((split, str(file)),), evaluation_image_dirs=(str(images),))
    return replace(config, data=data)


def _lasting(config: TrainConfig, size: DataSize, task: Task) -> TrainConfig:
    """The config for the epochs or steps that were asked for; the learning rate drops at the same share of them."""
    epochs = task.epochs
    if task.steps is not None:
        per_epoch = -(-size.images // (config.data.batch_size * distributed.world_size()))
        epochs = max(1, -(-task.steps // per_epoch))
    if epochs is None:
        return config
    drops = tuple(max(1, round(milestone * epochs / config.epochs)) for milestone in config.schedule.milestones)
    return replace(config, epochs=epochs, schedule=replace(config.schedule, milestones=drops))


def run(
    config: TrainConfig,
    prepared: Prepared,
    world: World,
    stop: StopRequest | None = None,
    callbacks: Sequence[Callback] = (),
) -> tuple[FitResult, Figures]:
    """Train, and evaluate the best checkpoint on the test split, if there is one.

    Returns:
        The run, and the figures on the test split; without one, the last figures on the validation split. With retained
        data, theirs too.
    """
    _log(summary(prepared))
    retention = None
    if "retain" in prepared.files:
        retention = Retention(Retained(prepared.files["retain"], prepared.images["retain"]), config, world)
    result = fit(config, world, stop, (Estimate(), *callbacks))
    figures = result.figures
    best = model_file.load_detector(best_of(result), world.device)
    if "test" in prepared.files:
        found = Assessor(replace(_evaluated_on("test", config, prepared), pictures=0)).assess(best)
        _log(line if line.startswith(" ") else f"best checkpoint, {line}" for line in found.lines())
        figures = found.figures
    if retention is not None:
        kept, table = retention.after(best)
        _log(iter(table))
        figures = {**figures, "retain": kept}
    return result, figures


def best_of(result: FitResult) -> Path:
    """The best checkpoint of a run; without an evaluation the last one."""
    return result.files.get("best", result.files["final"])


def _log(lines: Iterator[str]) -> None:
    if distributed.is_main():
        for line in lines:
            logger.info(line)


def summary(prepared: Prepared) -> Iterator[str]:
    """What was found, in lines."""
    counts = ", ".join(f"{count:,} to {PURPOSES[split]}" for split, count in prepared.counts.items())
    unit = "captions" if prepared.label_map is None else "images"
    yield f"data: {prepared.format}; {unit}: {counts}; {prepared.objects:,} boxes; prepared in {prepared.folder}"
    if prepared.categories:
        names, count = prepared.categories, len(prepared.categories)
        yield f"{count} categories: {', '.join(names[:SHOWN_CATEGORIES])}{', ...' * (count > SHOWN_CATEGORIES)}"
    yield from prepared.notes
    if prepared.problems:
        yield f"left out or corrected: {len(prepared.problems)}; `groundingdino data check` lists them by kind"
        yield from (f"  {problem}" for problem in prepared.problems[:SHOWN])
