"""TensorBoard, Weights & Biases and MLflow: `--log NAME ...`. Each is a callback, and is imported where it is used.

Accounts, servers and projects are set as these programs say: WANDB_PROJECT, WANDB_MODE=offline, MLFLOW_TRACKING_URI.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from groundingdino.config import TrainConfig, train_config_to_dict
from groundingdino.runtime.files import write_text
from groundingdino.training.callback import Callback
from groundingdino.training.recorder import StepValues
from groundingdino.training.resume import flat
from groundingdino.training.run_folder import RunFolder

PARAMETER_LENGTH = 500  # characters of a setting that MLflow shows
NOT_IN_A_NAME = re.compile(r"[^\w\-. :/]")  # in MLflow

logger = logging.getLogger(__name__)


def open_loggers(config: TrainConfig, folder: RunFolder, first_step: int) -> list[Callback]:
    """The loggers of `config.log`, for the main process; `first_step`: the number of steps already taken.

    ValueError in one line for a package that is not installed or not set up.
    """
    opened: list[Callback] = []
    for name in dict.fromkeys(config.log):
        try:
            if name == "tensorboard":
                opened.append(TensorBoard(folder, first_step))
            else:
                opened.append((WeightsAndBiases if name == "wandb" else MLflow)(config, folder))
        except ModuleNotFoundError as error:
            raise ValueError(f"--log {name} needs a package that is not installed: pip install {name}") from error
    return opened


def step_scalars(step: StepValues) -> dict[str, float]:
    """Every figure of a step, as "group/name"."""
    return {
        **{f"loss/{name}": value for name, value in step.terms.items()},
        "optimizer/lr": step.lr,
        "optimizer/grad_norm": step.grad_norm,
    }


class _Logger(Callback):
    """Turns steps and evaluations into calls of `scalars`."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log figures by name."""
        raise NotImplementedError

    def on_steps(self, steps: Sequence[StepValues], images_per_second: float) -> None:
        """Log each step, and the speed of them all."""
        for step in steps:
            speed = {"speed/images_per_second": images_per_second} if step is steps[-1] else {}
            self.scalars(step.step, {**step_scalars(step), **speed})

    def on_evaluation(self, step: int, epoch: int, figures: Mapping[str, Mapping[str, float]]) -> None:
        """Log every figure of every split."""
        rows = [(f"evaluation/{split} {name}", value) for split, row in figures.items() for name, value in row.items()]
        self.scalars(step, dict(rows))


class TensorBoard(_Logger):
    """Files in the run folder's `tensorboard`; what a killed run wrote after `first_step` is hidden."""

    def __init__(self, folder: RunFolder, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=first_step + 1)
        self._lost = False

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A curve for each."""
        for name, value in values.items():
            self._send("add_scalar", name, value, step)

    def on_evaluation(self, step: int, epoch: int, figures: Mapping[str, Mapping[str, float]]) -> None:
        """Log every figure of every split, to be seen at once."""
        super().on_evaluation(step, epoch, figures)
        self._send("flush")

    def on_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Show it."""
        pixels = numpy.asarray(picture.convert("RGB"))
        self._send("add_image", f"pictures/{name}", pixels, step, dataformats="HWC")

    def on_end(self) -> None:
        """Flush."""
        self._send("close")

    def _send(self, what: str, *arguments: Any, **options: Any) -> None:
        """Curves that cannot be written, on a full disk or in a deleted folder, end no training."""
        try:
            getattr(self._writer, what)(*arguments, **options)
        except OSError as error:
            if not self._lost:
                logger.warning(f"not logged in TensorBoard from here on: {error}")
            self._lost = True


class WeightsAndBiases(_Logger):
    """A run of wandb, which goes on where the training run does."""

    def __init__(self, config: TrainConfig, folder: RunFolder) -> None:
        import wandb

        self._image = wandb.Image
        number = folder.path / "wandb.id"
        try:
            self._run = wandb.init(
                dir=folder.path,
                name=folder.path.name,
                config=train_config_to_dict(config),
                id=_kept(number),
                resume="allow",
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise ValueError(f"--log wandb: {error}") from error
        write_text(number, self._run.id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A curve for each."""
        self._run.log(dict(values), step=step)

    def on_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Show it."""
        self._run.log({f"pictures/{name}": self._image(picture)}, step=step)

    def on_end(self) -> None:
        """Upload what is left."""
        self._run.finish()


class MLflow(_Logger):
    """A run of MLflow, which goes on where the training run does. A server that does not answer stops no training."""

    def __init__(self, config: TrainConfig, folder: RunFolder) -> None:
        import mlflow

        self._mlflow, self._error = mlflow, mlflow.exceptions.MlflowException
        number = folder.path / "mlflow.id"
        settings = flat(train_config_to_dict(config))
        try:
            kept = _kept(number)
            run = mlflow.start_run(run_id=kept, run_name=None if kept else folder.path.name)
            if kept is None:
                mlflow.log_params({name: str(value)[:PARAMETER_LENGTH] for name, value in settings.items()})
        except self._error as error:
            raise ValueError(f"--log mlflow: {error}") from error
        write_text(number, run.info.run_id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A curve for each."""
        self._send("log_metrics", {NOT_IN_A_NAME.sub("_", name): value for name, value in values.items()}, step=step)

    def on_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Keep it as an artifact."""
        self._send("log_image", picture, artifact_file=f"pictures/{name} step {step}.png")

    def _send(self, what: str, *arguments: Any, **options: Any) -> None:
        try:
            getattr(self._mlflow, what)(*arguments, **options)
        except (self._error, OSError) as error:
            logger.warning(f"not logged in MLflow: {error}")

    def on_end(self) -> None:
        """Mark the run as finished."""
        self._send("end_run")


def _kept(path: Path) -> str | None:
    return path.read_text() if path.exists() else None
