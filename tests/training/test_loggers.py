"""The same run in TensorBoard, Weights & Biases and MLflow, with their own packages."""

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
from training_runs import LAST_STEP, losses, small_config

from groundingdino.training.callback import Callback
from groundingdino.training.trainer import fit


def run_with(name: str, data: Path, run: Path, **changes: object) -> dict[int, dict[str, float]]:
    """One epoch with an evaluation and a picture; what it has written into metrics.jsonl."""
    config = small_config(data, run, epochs=1, log=(name,), pictures=1)
    fit(dataclasses.replace(config, **changes))  # type: ignore[arg-type]
    return losses(run)


def test_tensorboard_has_every_figure_and_the_pictures(data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = run_with("tensorboard", data, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("loss/loss")}
    assert found == pytest.approx({step: row["loss"] for step, row in rows.items()}, rel=1e-6)
    assert {"optimizer/lr", "speed/images_per_second", "evaluation/val precision@1"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["pictures/0"]


@pytest.mark.slow
def test_mlflow_has_every_figure_and_goes_on_with_a_resumed_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    run_with("mlflow", data, tmp_path / "run")
    run_with("mlflow", data, tmp_path / "run", epochs=2, resume="auto")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("Default").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run" and run.data.params["optimizer.lr"] == "0.001"
    history = client.get_metric_history(run.info.run_id, "loss/loss")
    assert sorted({metric.step for metric in history}) == list(range(1, 17))
    expected = {step: row["loss"] for step, row in losses(tmp_path / "run").items()}
    assert {metric.step: metric.value for metric in history} == pytest.approx(expected)
    assert "evaluation/val precision_1" in run.data.metrics
    assert client.list_artifacts(run.info.run_id, "pictures")


@pytest.mark.slow
def test_wandb_keeps_one_run_offline(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for epochs, resume in ((1, None), (2, "auto")):
        run_with("wandb", data, tmp_path / "run", epochs=epochs, resume=resume)
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    number = (tmp_path / "run" / "wandb.id").read_text()
    assert [file.name for file in files] == [f"run-{number}.wandb"] * 2
    for file in files:
        content = file.read_bytes()
        assert content.count(b"loss/loss") >= 7  # of 8 steps; one may lie across two blocks of the file
        assert b"evaluation/val precision@1" in content and b"pictures/0" in content


def test_a_package_that_is_not_installed_is_named_with_its_command(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--log wandb needs a package that is not installed: pip install wandb"):
        run_with("wandb", data, tmp_path / "run")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_folder_of_curves_that_is_deleted_ends_no_training(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class DeletesCurves(Callback):
        def on_steps(self, steps: object, images_per_second: float) -> None:
            shutil.rmtree(tmp_path / "run" / "tensorboard", ignore_errors=True)

    result = fit(small_config(data, tmp_path / "run", log=("tensorboard",)), callbacks=[DeletesCurves()])
    assert result.steps == LAST_STEP and result.files["final"].is_file()
    assert sum("not logged in TensorBoard from here on" in message for message in caplog.messages) == 1
