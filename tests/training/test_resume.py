"""A run that is killed and resumed ends where the uninterrupted run ends, to the last bit."""

import dataclasses
import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import environment, losses, scenes, small_config, start

from groundingdino.checkpoints import run_state, safetensors_file
from groundingdino.training.run_folder import RunFolder
from groundingdino.training.trainer import fit

LAST_STEP = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    fit(small_config(data, run))
    assert sorted(losses(run)) == list(range(1, LAST_STEP + 1))
    return run


def assert_same_end(run: Path, reference: Path) -> None:
    """The same figures at every step, the same weights, optimizer, average, random states, and best checkpoint."""
    assert losses(run) == losses(reference)
    for name in ("final.safetensors", "best.safetensors"):
        ours, theirs = load_file(run / name), load_file(reference / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    ours, theirs = load_file(run / "last.state"), load_file(reference / "last.state")
    assert ours.keys() == theirs.keys() and any("average" in key for key in ours)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    a, b = run_state.load_state(run / "last.state"), run_state.load_state(reference / "last.state")
    assert a["position"] == b["position"] and a["loader"] == b["loader"]
    assert a["random"][0]["python"] == b["random"][0]["python"]


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
    with pytest.raises(ValueError, match="ema-decay"):
        fit(dataclasses.replace(config, ema_decay=0.0))
    with pytest.raises(ValueError, match="seed"):
        fit(dataclasses.replace(config, seed=1))


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
