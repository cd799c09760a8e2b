"""`fit(config)`: the training loop, from one process on a CPU to many devices, safe against interruption.

A run that was killed and resumed takes the very steps that the uninterrupted run takes.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from groundingdino.checkpoints import adapter, model_file, run_state
from groundingdino.config import (
    TrainConfig,
    check_train_config,
    model_config_from_dict,
    model_config_to_dict,
    train_config_to_dict,
)
from groundingdino.data import Batch
from groundingdino.inference.visualize import tile
from groundingdino.model import GroundingDINO, build_detector, lora
from groundingdino.runtime import distributed
from groundingdino.runtime.distributed import World
from groundingdino.runtime.loader_process import loader_problem
from groundingdino.training import optimizer as optim
from groundingdino.training import random_state
from groundingdino.training.callback import Callback
from groundingdino.training.criterion import Criterion
from groundingdino.training.learner import Learner, group_batches
from groundingdino.training.loggers import open_loggers
from groundingdino.training.nonfinite import LossGuard
from groundingdino.training.profiling import StepProfiler
from groundingdino.training.recorder import DeferredSteps, MetricsLog, plot_curves
from groundingdino.training.resume import Position, TrainingState, changes, check_fits, load_state
from groundingdino.training.run_folder import RunFolder, RunLock
from groundingdino.training.setup import initial_model, training_loader, with_rates
from groundingdino.training.stop import RunStopped, StopRequest
from groundingdino.training.validation import Assessor, Figures

PROBLEMS_SHOWN = 5  # bad samples that are named; all are counted
PICTURES_PER_ROW = 2
GO_ON, STOP, FAILED = 0, 1, 2  # what processes tell each other before a step: the highest counts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """The result of a finished run."""

    run_dir: Path
    steps: int
    figures: Figures  # of the last evaluation; empty without any
    best: float  # best deciding figure, -1 without any evaluation
    files: dict[str, Path] = field(default_factory=dict)  # what there is of "best", "final", "metrics", "curves", ...


def fit(
    config: TrainConfig,
    world: World | None = None,
    stop: StopRequest | None = None,
    callbacks: Sequence[Callback] = (),
) -> FitResult:
    """Train as `config` says, from the start or from a checkpoint.

    Args:
        config: everything the run depends on.
        world: this process's place; None picks it (and joins torchrun's process group).
        stop: asked after each step whether to end early.
        callbacks: told how the run goes on.

    Raises:
        ValueError: something in the config, the data or the checkpoint that the user can fix, in one line.
        NonFiniteLossError: a loss was not finite and `config.on_nonfinite` is "stop".
        OSError: a checkpoint could not be written, and the one before is intact; or another process was lost.
        RunStopped: `stop` wanted it; the state is saved.
    """
    check_train_config(config)
    world = world or distributed.init(config.device)
    trainer = Trainer(config, world, stop or StopRequest(config.max_time), callbacks)
    try:
        return trainer.run()
    except RuntimeError as error:
        problem = loader_problem(error)  # torch raises these wherever the training process is just then
        if problem is None:
            raise
        raise ChildProcessError(problem) from error
    finally:
        trainer.close()


class Trainer:
    """One run: its learner, its data, its files."""

    def __init__(self, config: TrainConfig, world: World, stop: StopRequest, callbacks: Sequence[Callback]) -> None:
        self.config, self.world, self.stop, self.callbacks = config, world, stop, callbacks
        self.folder = RunFolder(config.run_dir)
        resume = distributed.broadcast_object(self.folder.find_resume(config.resume))
        saved = None if resume is None else load_state(resume)
        changed = [] if saved is None else changes(saved.config, config)
        random_state.seed_everything(config.seed, rank=0)  # fresh weights are the same on every process
        self.learner = Learner(self._model(saved), Criterion(config.class_weight), config, world.device)
        self.loader = training_loader(config, self.learner.model.config, world)
        self.assessor = Assessor(config)
        self.steps_per_epoch = -(-len(self.loader) // config.accumulation_steps)
        self.position = Position(step=0, epoch=0, unevaluated=False, best=-1.0, problems=0)
        random_state.seed_everything(config.seed, world.rank)
        if saved is not None:
            self._restore(saved)
            logger.info(f"resumed from {resume}: {self.position.step} steps, {self.position.epoch} epochs")
            for change in changed:
                logger.warning(f"resumed with {change}")
            del saved
        self.deferred = DeferredSteps()
        self.guard = LossGuard(self.folder.nonfinite, config.on_nonfinite, self.learner.scaler.is_enabled())
        profile = config.profile if distributed.is_main() else None
        self.profiler = StepProfiler(profile, self.folder.profile, world.device)
        self.log: MetricsLog | None = None
        self.lock: RunLock | None = None
        if distributed.is_main():
            config.run_dir.mkdir(parents=True, exist_ok=True)
            self.lock = RunLock(self.folder)
            self.folder.remove_leftovers()
            self.log = MetricsLog(self.folder, self.position.step)
            self.callbacks = (*callbacks, *open_loggers(config, self.folder, self.position.step))
            self._write_settings()
        distributed.barrier()
        total = self.steps_per_epoch * config.epochs
        for callback in self.callbacks:
            callback.on_start(self.learner, self.loader, total - self.position.step)
        self.bar = tqdm(
            total=total, initial=self.position.step, disable=not distributed.is_main(), unit="step", mininterval=1.0
        )

    def _model(self, saved: TrainingState | None) -> GroundingDINO:
        """The model of this run; where there is a saved state, with its sizes and any weights."""
        if self.config.lora and self.config.init_from is None:
            raise ValueError("--lora adapts a trained model: name its weights with --init-from")
        if saved is None:
            return self._prepared(initial_model(self.config))
        sizes = with_rates(model_config_from_dict(saved.model_config), self.config.model)
        with torch.device("meta"):  # no memory is taken for a model that the state does not fit
            expected = build_detector(sizes).state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        check_fits("model", lora.base_state(saved.model), shapes)
        return self._prepared(build_detector(sizes))

    def _prepared(self, model: GroundingDINO) -> GroundingDINO:
        model.set_activation_checkpointing(self.config.activation_checkpointing)
        if self.config.lora:
            lora.add_adapters(model, self.config.lora, self._adapted_parts())
        return model

    def _adapted_parts(self) -> tuple[str, ...]:
        frozen = {part.partition(".")[0] for part in self.config.freeze}
        return tuple(part for part in lora.PARTS if part not in frozen)

    def _write_settings(self) -> None:
        """The resolved config and the environment into the run folder, and the figures that a user checks first."""
        learner, config = self.learner, self.config
        model = learner.model.config
        found = {"lr": learner.lr, "images_per_step": learner.images_per_step, "steps_per_epoch": self.steps_per_epoch}
        resolved = {**train_config_to_dict(config), "model": model_config_to_dict(model), "resolved": found}
        self.folder.write_settings(resolved, self.world)
        optimizer, images = config.optimizer, learner.images_per_step
        base = f"{optimizer.lr:g} for {optimizer.base_batch} images" if optimizer.scale_lr else "as given"
        how = f"{config.data.batch_size} x {config.accumulation_steps} x {self.world.size} processes"
        logger.info(f"{model.name} on {self.world.device} in {config.precision}; {images} images per step ({how})")
        logger.info(f"learning rate {learner.lr:g} ({base}); {self.steps_per_epoch} steps per epoch; {config.run_dir}")
        logger.info(learner.size())

    def run(self) -> FitResult:
        """All epochs that are left, then the final files."""
        figures: Figures = {}
        if self.position.unevaluated:
            figures = self._evaluate()
        while self.position.epoch < self.config.epochs and not self._is_stale():
            self._epoch()
            reason = self.stop.reason()
            if distributed.highest(STOP if reason is not None else GO_ON) == STOP:
                raise self._stopped(reason)
            if self.position.unevaluated:
                figures = self._evaluate()
        return self._finish(figures)

    def _is_stale(self) -> bool:
        """Whether the first figure has not risen for `config.early_stopping` evaluations, which ends the run."""
        patience = self.config.early_stopping
        stale = 0 < patience <= self.position.stale
        if stale:
            logger.info(f"stopped early: no better figure in {self.position.stale} evaluations")
        return stale

    def _epoch(self) -> None:
        config, position = self.config, self.position
        since_save = position.step
        self.stop.at_once = False
        for group in self._groups():
            factor = optim.lr_factor(config.schedule, position.step, self.steps_per_epoch, config.epochs)
            self.profiler.before(position.step + 1)
            with distributed.naming_lost_processes():
                terms, norm = self.learner.step(group, factor)
            position.step += 1
            self._note_problems([problem for batch in group for problem in batch.problems])
            self.deferred.add(
                terms,
                norm,
                self.learner.clock.take(),
                step=position.step,
                epoch=position.epoch,
                lr=self.learner.lr * factor,
                images=self.learner.images_per_step,
                samples=tuple(info for batch in group for info in batch.info),
            )
            at_end = self.loader.done == len(self.loader)
            due = position.step - since_save >= config.save_every and not at_end
            if due or at_end or len(self.deferred) >= config.log_every:
                self._log_steps()
            if due:
                self._save()
                since_save = position.step
        position.epoch += 1
        due = position.epoch % config.evaluate_every == 0 or position.epoch == config.epochs
        position.unevaluated = due and bool(config.data.evaluation)
        self._save()
        if position.problems:
            logger.warning(f"bad samples left out or repaired so far in this process: {position.problems}")

    def _groups(self) -> Iterator[list[Batch]]:
        """The micro-batches of each step that is left in this epoch.

        The processes agree before each step: all of them end here if one of them should, or has no batch.

        Raises:
            RunStopped: after the state was saved.
            ValueError: a bad sample of this or of another process. OSError: its files cannot be read.
        """
        groups = group_batches(self.loader, self.config.accumulation_steps)
        while True:
            here = self.loader.state_dict()
            group, problem = None, None
            begin = time.perf_counter()
            try:
                group = next(groups, None)
            except (ValueError, OSError) as error:
                problem = error
            self.learner.clock.add("data", time.perf_counter() - begin)
            reason = self.stop.reason()
            verdict = distributed.highest(FAILED if problem is not None else STOP if reason is not None else GO_ON)
            if verdict == FAILED:
                problems = distributed.gather_objects(None if problem is None else str(problem))
                rank, text = next((rank, text) for rank, text in enumerate(problems) if text is not None)
                raise problem or ValueError(f"process {rank}: {text}")
            if verdict == STOP and group is not None:
                self._log_steps()
                self._save(here)
                raise self._stopped(reason)
            if group is None:
                return
            yield group

    def _stopped(self, reason: str | None) -> RunStopped:
        by = next((r for r in distributed.gather_objects(reason) if r is not None), "request")
        return RunStopped(f"stopped by {by} after step {self.position.step}, the state is saved")

    def _note_problems(self, problems: list[str]) -> None:
        for problem in problems:
            self.position.problems += 1
            if self.position.problems <= PROBLEMS_SHOWN:
                logger.warning(f"skipped: {problem}")

    def _log_steps(self) -> None:
        """Copy pending losses to the host, log them, check they are finite."""
        distributed.highest(GO_ON)  # whoever is gone is noticed here; the device would wait for it below
        with distributed.naming_lost_processes():
            steps = self.deferred.read()
        if not steps:
            return
        if self.log is not None:
            speed = self.log.steps(steps)
            for callback in self.callbacks:
                callback.on_steps(steps, speed)
            last = steps[-1]
            self.bar.set_description(f"epoch {last.epoch + 1}/{self.config.epochs}", refresh=False)
            self.bar.set_postfix(loss=f"{last.terms['loss']:.3f}", images_per_s=f"{speed:.2f}", refresh=False)
            self.bar.update(len(steps))
        self.guard.check(steps)

    def _save(self, loader: dict[str, Any] | None = None) -> None:
        """Write everything that is needed to go on. `loader` is its state, None for the present one."""
        random = distributed.gather_objects(random_state.random_states(self.world.device))
        if distributed.is_main():
            state = {
                **self.learner.state(),
                "position": vars(self.position),
                "loader": loader or self.loader.state_dict(),
                "random": random,
                "config": train_config_to_dict(self.config),
                "model_config": model_config_to_dict(self.learner.model.config),
            }
            run_state.save_state(self.folder.state, state)
            assert self.log is not None
            self.log.skip_time()
        distributed.barrier()

    def _restore(self, state: TrainingState) -> None:
        self.learner.load_state(state)
        self.loader.load_state_dict(vars(state.loader))
        self.position = state.position
        same_draws = state.config.get("accumulation_steps") == self.config.accumulation_steps
        if same_draws and len(state.random) == self.world.size:
            random_state.set_random_states(self.world.device, vars(state.random[self.world.rank]))
        else:
            logger.info("not the processes or micro-batches that the state was saved with: new random numbers")

    def _evaluate(self) -> Figures:
        """Every split, the pictures, and the best checkpoint where this is it."""
        position = self.position
        self.stop.at_once = True  # the state is saved, and an evaluation can be done again
        with random_state.kept_random_states(self.world.device):
            model = self.learner.for_evaluation()
            found = self.assessor.assess(model)
            position.unevaluated = False
            position.stale += 1
            if found.deciding > position.best:
                position.best, position.stale = found.deciding, 0
                if distributed.is_main():
                    self._save_model(self.folder.best, found.figures)
        if self.log is not None:
            self.log.evaluation(position.step, position.epoch, found.figures)
            for callback in self.callbacks:
                callback.on_evaluation(position.step, position.epoch, found.figures)
            pictures = self.assessor.pictures(found)
            for number, picture in enumerate(pictures):
                for callback in self.callbacks:
                    callback.on_picture(position.step, str(number), picture)
            if pictures:
                tile(pictures, PICTURES_PER_ROW).save(self.folder.pictures)
            for line in found.lines():
                logger.info(line if line.startswith(" ") else f"epoch {position.epoch}, {line}")
        if self.log is not None:
            self.log.skip_time()
        distributed.barrier()
        return found.figures

    def _save_model(self, path: Path, figures: Figures) -> None:
        """Write the model, and its adapters beside it."""
        model, metadata = self.learner.for_evaluation(), self._provenance(figures)
        model_file.save_detector(path, model, metadata)
        if self.config.lora:
            base = adapter.identity(lora.base_state(model.state_dict()))
            origin = adapter.AdapterOrigin(self.config.lora, self._adapted_parts(), base, str(self.config.init_from))
            adapter.save_adapter(self.folder.adapter_of(path), model, origin, metadata)

    def _provenance(self, figures: Figures) -> dict[str, str]:
        trained = {"step": self.position.step, "epoch": self.position.epoch, "figures": figures}
        scale = (self.config.data.evaluation_side, self.config.data.evaluation_long_side)
        return {"groundingdino.training": json.dumps(trained), model_file.SCALE_KEY: json.dumps(scale)}

    def _finish(self, figures: Figures) -> FitResult:
        if self.log is not None:
            self._save_model(self.folder.final, figures)
            plot_curves(self.folder)
        distributed.barrier()
        files = self.folder.results()
        return FitResult(self.folder.path, self.position.step, figures, self.position.best, files)

    def close(self) -> None:
        """Close the files and the progress bar; also after an error."""
        self.bar.close()
        for callback in self.callbacks:
            callback.on_end()
        self.profiler.close()
        if self.log is not None:
            self.log.close()
        if self.lock is not None:
            self.lock.close()
