"""A run that is killed and resumed ends where the uninterrupted run ends, to the last bit."""

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import LAST_STEP, assert_same_end, environment, losses, scenes, small_config, start

from groundingdino.checkpoints import run_state, safetensors_file
from groundingdino.training.recorder import MetricsLog, read_metrics
from groundingdino.training.run_folder import RunFolder, RunLock
from groundingdino.training.trainer import fit


@pytest.mark.slow
def test_kills_at_random_steps_while_saving_and_while_evaluating_change_nothing(
    data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert start(data, run, "step:2") != 0
    assert not (run / "last.state").exists()  # killed before the first checkpoint: starts afresh
    step = random.Random(str(tmp_path)).randint(4, 7)  # after the first checkpoint, within the first epoch
    for condition in (f"step:{step}", "save:40", "evaluation:1", "never"):
        code = start(data, run, condition)
        assert (code == 0) == (condition == "never"), condition
        state = run_state.load_state(run / "last.state")  # whole and readable after each kill
        assert state["position"]["step"] in (3, 6, 8, 16), condition
        assert bool(list(run.glob(".*.tmp"))) == condition.startswith("save"), condition
    assert_same_end(run, uninterrupted)


def test_a_finished_run_resumes_to_the_same_end_and_more_epochs_go_on_from_there(
    data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    state = uninterrupted / "last.state"
    run = tmp_path / "run"
    longer = small_config(data, run, epochs=3, resume=str(state))
    assert fit(longer).steps == LAST_STEP + 8
    assert sorted(losses(run)) == list(range(LAST_STEP + 1, LAST_STEP + 9))


def test_a_full_disk_while_saving_says_so_and_keeps_the_old_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls, original = tmp_path / "run", [0], safetensors_file._bytes_of

    def full(tensor: torch.Tensor) -> memoryview:
        calls[0] += (run / "last.state").exists()
        if calls[0] > 40:  # in the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(tensor)

    # The disk has to fill up between two tensors of one file, where no public door leads.
    monkeypatch.setattr(safetensors_file, "_bytes_of", full)
    with pytest.raises(OSError, match="last.state.*disk is full.*as it was"):
        fit(small_config(data, run))
    assert run_state.load_state(run / "last.state")["position"]["step"] == 3
    assert not list(run.glob(".*.tmp"))


def test_resume_is_asked_for_and_names_what_is_missing(uninterrupted: Path, tmp_path: Path) -> None:
    empty, used = RunFolder(tmp_path), RunFolder(uninterrupted)
    assert empty.find_resume(None) is None
    assert empty.find_resume("auto") is None
    assert used.find_resume("auto") == used.state
    assert empty.find_resume(str(uninterrupted)) == used.state
    with pytest.raises(ValueError, match="go on with --resume auto"):
        used.find_resume(None)
    with pytest.raises(ValueError, match="nothing to resume"):
        empty.find_resume(str(tmp_path / "nowhere.state"))


def test_the_state_of_another_model_or_seed_is_refused(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    state = str(uninterrupted / "last.state")
    config = small_config(data, tmp_path / "run", resume=state)
    with pytest.raises(ValueError, match="ema-decay is on in only one"):
        fit(dataclasses.replace(config, ema_decay=0.0))
    with pytest.raises(ValueError, match="seed"):
        fit(dataclasses.replace(config, seed=1))


def test_a_folder_whose_state_is_gone_is_not_overwritten(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "best.safetensors").write_bytes((uninterrupted / "best.safetensors").read_bytes())
    for resume in (None, "auto", str(uninterrupted)):
        with pytest.raises(ValueError, match="best.safetensors of another run"):
            RunFolder(run).find_resume(resume)


def test_resume_applies_new_rates_decay_and_betas_and_says_so(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    config = small_config(data, run, epochs=1)
    fit(config)
    optimizer = dataclasses.replace(
        config.optimizer, weight_decay=0.5, betas=(0.5, 0.9), lr_multipliers=(("backbone", 0.0), ("decoder", 0.5))
    )
    before = run_state.load_state(run / "last.state")["model"]
    fit(dataclasses.replace(config, epochs=2, optimizer=optimizer, resume="auto"))
    said = [line.removeprefix("resumed with ") for line in caplog.messages if line.startswith("resumed with")]
    assert "epochs 1 -> 2" in said and "optimizer.weight-decay 0.0001 -> 0.5" in said
    assert "optimizer.betas [0.9 0.999] -> [0.5 0.9]" in said and len(said) == 4
    after = run_state.load_state(run / "last.state")["model"]
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("backbone."))
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("decoder."))


def test_resume_refuses_what_a_saved_state_depends_on(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run", resume=str(uninterrupted / "last.state"))
    sources = dataclasses.replace(config.data, sampling_weights=(2.0,))
    other = {
        "model.width 64 -> 128": {"model": dataclasses.replace(config.model, width=128)},
        "data.sampling-weights \\[1\\] -> \\[2\\]": {"data": sources},
        "init-from None -> a.safetensors": {"init_from": Path("a.safetensors")},
        "freeze \\[\\] -> \\[backbone\\]": {"freeze": ("backbone",)},
    }
    for message, change in other.items():
        with pytest.raises(ValueError, match=f"cannot resume with {message}"):
            fit(dataclasses.replace(config, **change))
    assert not (tmp_path / "run").exists()


def test_training_files_that_have_changed_are_not_gone_on_with(uninterrupted: Path, tmp_path: Path) -> None:
    data = scenes(tmp_path / "data")
    file = data / "mdetr_annotations" / "finetune_refcoco_train.json"
    document = json.loads(file.read_text())
    *images, last = document["images"]
    annotations = [one for one in document["annotations"] if one["image_id"] != last["id"]]
    file.write_text(json.dumps({**document, "images": images, "annotations": annotations}))
    with pytest.raises(ValueError, match=r"hold \[15\] entries, \[16\] when the checkpoint was saved"):
        fit(small_config(data, tmp_path / "run", resume=str(uninterrupted)))


def test_single_precision_goes_on_in_half_precision(data: Path, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run", epochs=1)
    fit(config)
    again = dataclasses.replace(config, epochs=2, resume="auto", precision="fp16")
    assert fit(again).steps == LAST_STEP
    assert fit(dataclasses.replace(again, epochs=3, precision="bf16")).steps == LAST_STEP + 8


FIELDS = ["model", "optimizer", "scaler", "average", "position", "loader", "random", "config", "model_config"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_state_with_a_field_missing_or_of_another_type_is_refused(
    field: str, data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    state = run_state.load_state(uninterrupted / "last.state")
    config = small_config(data, tmp_path / "run", resume=str(tmp_path / "bad.state"))
    for wrong in (None, 7, [1.5], {"x": "y"}):
        damaged = {k: v for k, v in state.items() if k != field} | ({} if wrong is None else {field: wrong})
        run_state.save_state(tmp_path / "bad.state", damaged)
        if field == "config" and isinstance(wrong, dict):
            with pytest.raises(ValueError, match="ema-decay is on in only one"):
                fit(dataclasses.replace(config, ema_decay=0.0))
            continue  # a config is compared field by field
        with pytest.raises(ValueError, match="training state|model config|cannot resume"):
            fit(config)


def test_optimizer_tensors_of_another_model_are_refused_before_anything_is_changed(
    data: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    state = run_state.load_state(uninterrupted / "last.state")
    name = next(iter(state["optimizer"]))
    for part, wrong in (("exp_avg", torch.zeros(1)), ("step", torch.zeros(3)), ("momentum", torch.zeros(1))):
        values = {**state["optimizer"][name], part: wrong}
        run_state.save_state(tmp_path / "bad.state", {**state, "optimizer": {**state["optimizer"], name: values}})
        with pytest.raises(ValueError, match=f"optimizer's {part}"):
            fit(small_config(data, tmp_path / "run", resume=str(tmp_path / "bad.state")))


def test_a_run_folder_is_for_one_process_at_a_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path)
    code = (
        "import sys, time; from pathlib import Path; from groundingdino.training.run_folder import RunFolder, RunLock\n"
        "lock = RunLock(RunFolder(Path(sys.argv[1]))); print('locked', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"in use by process {owner.pid} on .*--run-dir"):
            RunLock(folder)
        owner.kill()
    lock = RunLock(folder)
    assert f"taking over {tmp_path} from process {owner.pid}" in caplog.text
    lock.close()
    caplog.clear()
    RunLock(folder).close()
    assert not caplog.messages and not list(tmp_path.iterdir())


def torchrun(data: Path, run: Path, condition: str, **variables: str) -> None:
    """Two ranks with at most one restart. AssertionError with their output if they fail or hang."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1", "--standalone"]
    command += [str(Path(__file__).parent.parent / "training_runs.py"), str(data), str(run), condition]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, env={**environment(), **variables}, **options) as process:
        try:
            output = process.communicate(timeout=180)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its workers
            output = process.communicate()[0]
            raise AssertionError(output[-3000:]) from None
    assert process.returncode == 0, output[-3000:]


@pytest.mark.slow
def test_torchrun_restarts_after_one_of_two_ranks_is_killed(data: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "uninterrupted"
    torchrun(data, run, "step:6", KILL_RANK="1")
    assert run.with_suffix(".killed").exists()
    assert sorted(losses(run)) == list(range(1, 9))  # 16 expressions, 2 ranks with 2 each, 2 epochs
    torchrun(data, other, "never")
    assert losses(run) == losses(other)


def test_an_evaluation_that_is_done_again_is_written_once(tmp_path: Path) -> None:
    rows = [{"step": 7, "loss": 1.0}, {"step": 8, "loss": 1.0}, {"step": 8, "evaluation": {}}, {"step": 9, "loss": 1.0}]
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 1')
    log = MetricsLog(folder, 8)
    log.evaluation(8, 1, {})
    log.close()
    assert [(row["step"], "evaluation" in row) for row in read_metrics(folder.metrics)] == [
        (7, False), (8, False), (8, True),
    ]  # fmt: skip
