"""A whole run on a tiny scale: its files, precisions, options, and trouble."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import SMALL, losses, scenes, small_config

from groundingdino.checkpoints import model_file, run_state
from groundingdino.config import TrainConfig
from groundingdino.model import build_detector
from groundingdino.runtime.distributed import World
from groundingdino.training.criterion import Criterion
from groundingdino.training.learner import Learner, group_batches
from groundingdino.training.nonfinite import LossGuard, NonFiniteLossError
from groundingdino.training.recorder import DeferredSteps, StepValues
from groundingdino.training.setup import training_loader
from groundingdino.training.trainer import fit
from groundingdino.training.validation import Assessor

TERMS = {"loss_cls", "loss_bbox", "loss_iou"}


def one_epoch(data: Path, run: Path, **changes: Any) -> TrainConfig:
    """8 steps without evaluation."""
    config = small_config(data, run, epochs=1, ema_decay=0.0, **changes)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, evaluation=()))


def step_values(loss: float) -> StepValues:
    return StepValues(1, 0, 1e-3, 2, {"loss": loss}, own_loss=loss, grad_norm=loss, samples=())


def mean_loss(run: Path) -> float:
    rows = losses(run).values()
    return sum(row["loss"] for row in rows) / len(rows)


@pytest.fixture
def losses_turn_bad(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """The numbers of the steps whose loss is made NaN, to be filled by the test."""
    bad: set[int] = set()
    calls, original = [0], Criterion.forward

    def forward(self: Criterion, *arguments: Any) -> dict[str, Tensor]:
        calls[0] += 1
        terms = original(self, *arguments)
        if calls[0] in bad:
            # A constant: without care the gradient of the other terms would look sound.
            terms["loss_iou"] = terms["loss_iou"].detach() * math.nan
        return terms

    monkeypatch.setattr(Criterion, "forward", forward)
    yield bad


def test_a_run_leaves_everything_that_is_promised(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "groundingdino")
    run = tmp_path / "run"
    config = small_config(data, run, epochs=1, pictures=3)
    result = fit(config)

    assert set(result.files) == {"best", "final", "metrics", "curves", "pictures"}
    assert all(path.exists() for path in result.files.values())
    for name in ("curves", "pictures"):
        assert min(Image.open(result.files[name]).size) > 100
    assert list((run / "tensorboard").iterdir())
    resolved = json.loads((run / "config.json").read_text())
    assert resolved["resolved"] == {"lr": 1e-3, "images_per_step": 2, "steps_per_epoch": 8}
    assert resolved["model"]["width"] == SMALL.width and resolved["data"]["root"] == str(data)
    assert {"packages", "device", "revision", "command"} <= json.loads((run / "environment.json").read_text()).keys()
    assert any("learning rate 0.001" in line for line in caplog.messages)

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    prefixes = ("", "d0.", "enc_", "d0.dn_", "dn_")
    for row in rows[:-1]:
        terms = {f"{prefix}{term}" for prefix in prefixes for term in TERMS}
        assert set(row) == terms | {"step", "epoch", "loss", "lr", "grad_norm", "images_per_second", "seconds"}
        assert set(row["seconds"]) == {"data", "forward", "backward", "optimizer"} and min(row["seconds"].values()) >= 0
        assert row["loss"] == pytest.approx(sum(row[term] for term in terms), rel=1e-5)
        assert row["grad_norm"] > 0 and row["images_per_second"] > 0
    assert rows[-1]["evaluation"] == result.figures

    model = model_file.load_detector(result.files["best"])  # a plain detector, with the averaged weights
    scale = [config.data.evaluation_side, config.data.evaluation_long_side]
    assert json.loads(model_file.read_metadata(result.files["best"])[model_file.SCALE_KEY]) == scale
    assert Assessor(config).assess(model).figures == result.figures


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(
    data: Path, tmp_path: Path, losses_turn_bad: set[int]
) -> None:
    losses_turn_bad.add(5)
    run = tmp_path / "run"
    with pytest.raises(NonFiniteLossError, match=r"step 5: the loss is not finite.*COCO_train2014_\d+\.jpg \('.+'\)"):
        fit(one_epoch(data, run))
    (record,) = (json.loads(line) for line in (run / "nonfinite.jsonl").read_text().splitlines())
    assert record["step"] == 5 and record["loss"] is None and record["terms"] == ["loss", "loss_iou"]
    assert len(record["samples"]) == 2
    assert all(Path(sample["image"]).exists() and sample["caption"] for sample in record["samples"])
    assert run_state.load_state(run / "last.state")["position"]["step"] == 3


def test_a_loss_that_is_not_finite_can_be_skipped_and_leaves_no_trace_in_the_weights(
    data: Path, tmp_path: Path, losses_turn_bad: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    losses_turn_bad.add(5)
    run = tmp_path / "run"
    assert fit(one_epoch(data, run, on_nonfinite="skip")).steps == 8
    assert sum("step 5: the loss is not finite" in line for line in caplog.messages) == 1
    rows = losses(run)
    assert rows[5]["loss"] is None and rows[5]["grad_norm"] is None
    assert all(math.isfinite(rows[step]["loss"]) for step in rows if step != 5)
    tensors = run_state.load_state(run / "last.state")
    assert all(value.isfinite().all() for value in tensors["model"].values())
    steps = {int(state["step"]) for state in tensors["optimizer"].values()}
    assert steps == {7}  # eight batches, one left out


def test_a_step_that_is_left_out_for_its_loss_does_not_move_the_average(
    data: Path, tmp_path: Path, losses_turn_bad: set[int]
) -> None:
    losses_turn_bad.add(2)
    config = dataclasses.replace(one_epoch(data, tmp_path / "run"), ema_decay=0.9)
    learner = Learner(build_detector(SMALL), Criterion(), config, torch.device("cpu"))
    batches = list(training_loader(config, SMALL, World(0, 0, 1, learner.device)))
    learner.step(batches[:1], 1.0)
    average = {name: value.clone() for name, value in learner.average.state().items()}
    weights = dict(learner.model.named_parameters())
    assert any(not torch.equal(average[name], weight) for name, weight in weights.items())  # it has where to move
    _, norm = learner.step(batches[1:2], 1.0)
    assert not norm.isfinite()
    assert all(torch.equal(value, average[name]) for name, value in learner.average.state().items())
    learner.step(batches[2:3], 1.0)
    assert learner.average.state()["steps"] == 2 and not torch.equal(
        learner.average.state()["level_embedding"], average["level_embedding"]
    )


def test_terms_that_are_infinite_are_named_as_those_that_are_no_numbers_are(tmp_path: Path) -> None:
    step = dataclasses.replace(
        step_values(math.inf), terms={"loss": math.inf, "loss_cls": 1.0, "loss_bbox": -math.inf, "loss_iou": math.nan}
    )
    LossGuard(tmp_path / "nonfinite.jsonl", "skip", scaled=False).check([step])
    record = json.loads((tmp_path / "nonfinite.jsonl").read_text())
    assert record["terms"] == ["loss", "loss_bbox", "loss_iou"]


def test_only_bad_losses_give_up_in_the_end(tmp_path: Path) -> None:
    guard = LossGuard(tmp_path / "nonfinite.jsonl", "skip", scaled=False, max_in_a_row=4)
    bad, good = step_values(math.nan), step_values(1.0)
    guard.check([bad, bad, bad, good])
    guard.check([bad, bad, bad])
    with pytest.raises(NonFiniteLossError, match="4 steps in a row"):
        guard.check([bad])


def test_half_precision_trains_like_float32(data: Path, tmp_path: Path) -> None:
    rows = {}
    for precision in ("fp32", "bf16", "fp16"):
        fit(one_epoch(data, tmp_path / precision, precision=precision))
        rows[precision] = losses(tmp_path / precision)
        assert not (tmp_path / precision / "nonfinite.jsonl").exists()
        assert rows[precision][1]["loss"] == pytest.approx(rows["fp32"][1]["loss"], rel=0.02)
    assert mean_loss(tmp_path / "bf16") == pytest.approx(mean_loss(tmp_path / "fp32"), rel=0.05)
    # The loss scale of fp16 starts too high by design: its first steps are left out until it fits.
    left_out = [step for step, row in rows["fp16"].items() if row["grad_norm"] is None]
    scaler = run_state.load_state(tmp_path / "fp16" / "last.state")["scaler"]
    assert scaler["scale"] == 2.0 ** (16 - len(left_out))
    assert 1 in left_out and len(left_out) < 8
    assert min(row["loss"] for row in rows["fp16"].values()) < 0.95 * rows["fp16"][1]["loss"]


def test_checkpointed_activations_change_no_loss(data: Path, tmp_path: Path) -> None:
    fit(one_epoch(data, tmp_path / "plain"))
    fit(one_epoch(data, tmp_path / "recomputed", activation_checkpointing=True))
    plain, recomputed = losses(tmp_path / "plain"), losses(tmp_path / "recomputed")
    for step in plain:
        assert recomputed[step]["loss"] == pytest.approx(plain[step]["loss"], rel=1e-4)


def test_frozen_parts_stay_and_all_else_moves(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fit(one_epoch(data, tmp_path / "start"))
    start = model_file.load_detector(tmp_path / "start" / "final.safetensors").state_dict()
    config = one_epoch(data, tmp_path / "run", freeze=("backbone", "text_encoder"))
    fit(dataclasses.replace(config, init_from=tmp_path / "start" / "final.safetensors"))
    end = model_file.load_detector(tmp_path / "run" / "final.safetensors").state_dict()
    same = {name for name in start if torch.equal(start[name], end[name])}
    assert same == {name for name in start if name.startswith(("backbone.", "text_encoder."))}


def test_weights_to_start_from_bring_their_sizes_but_not_their_dropout(data: Path, tmp_path: Path) -> None:
    fit(one_epoch(data, tmp_path / "start"))
    other = dataclasses.replace(SMALL, width=128, fusion_dropout=0.0)
    config = one_epoch(data, tmp_path / "run", init_from=tmp_path / "start" / "final.safetensors", model=other)
    fit(config)
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert resolved["width"] == SMALL.width and resolved["fusion_dropout"] == 0.0


def test_accumulation_takes_one_step_for_its_micro_batches(data: Path, tmp_path: Path) -> None:
    result = fit(one_epoch(data, tmp_path / "run", accumulation_steps=3))
    assert result.steps == 3  # 8 micro-batches: 3, 3 and 2
    assert [len(group) for group in group_batches(iter(range(8)), 3)] == [3, 3, 2]  # type: ignore[arg-type]


def test_bad_samples_are_skipped_and_counted_or_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = scenes(tmp_path / "data")
    broken = sorted((data / "train2014").glob("*.jpg"))[0]
    broken.write_bytes(broken.read_bytes()[:200])
    config = one_epoch(data, tmp_path / "run")
    with pytest.raises(ValueError, match=broken.name):
        fit(config)
    fit(
        dataclasses.replace(
            config, run_dir=tmp_path / "other", data=dataclasses.replace(config.data, on_bad_sample="skip")
        )
    )
    assert any(broken.name in line for line in caplog.messages)
    assert "bad samples left out or repaired so far in this process: 1" in caplog.messages


def test_a_step_waits_for_the_device_only_to_match(data: Path, tmp_path: Path) -> None:

    class Reads(TorchDispatchMode):
        """Counts operators whose result the host has to wait for."""

        names = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")

        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(name in str(func) for name in self.names):
                self.found.append(str(func))
            return func(*args, **(kwargs or {}))

    world = World(0, 0, 1, torch.device("cpu"))
    config = one_epoch(data, tmp_path / "run")
    learner = Learner(build_detector(SMALL), Criterion(), config, world.device)
    deferred = DeferredSteps()
    batches = list(training_loader(config, SMALL, world))
    with Reads() as reads:
        for batch in batches[:3]:
            terms, norm = learner.step([batch], 1.0)
            deferred.add(terms, norm, learner.clock.take(), step=1, epoch=0, lr=1.0, images=2, samples=batch.info)
    assert reads.found == []
    assert len(deferred.read()) == 3
