"""A run that is asked to end saves its state at the next step, says so, and goes on bit-equal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import LAST_STEP, assert_same_end, environment, free_port, losses, scenes, small_config, start

from groundingdino.checkpoints import run_state
from groundingdino.training.stop import RunStopped, StopRequest, seconds, stop_on_signals
from groundingdino.training.trainer import fit


class AfterSteps(StopRequest):
    """Wants the run to end once it was asked so many times."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count

    def reason(self) -> str | None:
        self.left -= 1
        return "the test" if self.left < 0 else None


def test_a_run_that_is_stopped_at_any_step_goes_on_bit_equal(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run", resume="auto")
    for count, step in ((0, 0), (4, 4), (4, 8), (3, 11)):  # 8: at the end of an epoch, before its evaluation
        with pytest.raises(RunStopped, match=f"stopped by the test after step {step}, the state is saved"):
            fit(config, stop=AfterSteps(count))
        assert run_state.load_state(tmp_path / "run" / "last.state")["position"]["step"] == step
    fit(config)
    assert_same_end(tmp_path / "run", uninterrupted)


def test_time_that_is_up_ends_a_run_before_its_next_step(data: Path, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run", max_time="0s")
    with pytest.raises(RunStopped, match="stopped by --max-time 0s after step 0"):
        fit(config)
    assert StopRequest("1h").reason() is None


@pytest.mark.parametrize(("times", "stopped"), [([1, 2, 3], False), ([3, 4, 6.9], False), ([3, 4, 7], True)])
def test_a_run_ends_where_one_more_step_as_long_as_the_longest_would_not_fit(
    times: list[float], stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    request = StopRequest("10s")
    reasons = []
    for passed in times:
        now[0] = 100.0 + passed
        reasons.append(request.reason())
    assert reasons == [None, None, "--max-time 10s" if stopped else None]


@pytest.mark.parametrize(("text", "expected"), [("3h50m", 13800), ("90m", 5400), ("1d1s", 86401), ("0s", 0)])
def test_durations(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "3", "h", "1.5h", "50m3h", "-1h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 3h50m"):
        seconds(text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_is_a_request_a_second_one_ends_at_once(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    with stop_on_signals(StopRequest()) as request:
        request.at_once = False
        os.kill(os.getpid(), number)
        assert request.reason() == number.name
        os.kill(os.getpid(), number)  # the launcher passing on the same one
        later = time.monotonic() + 10
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(1)
    assert signal.getsignal(number) is before


def test_a_signal_while_nothing_can_be_lost_ends_at_once() -> None:
    with stop_on_signals(StopRequest()), pytest.raises(RunStopped, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


@pytest.mark.slow
def test_signals_to_the_program_save_and_change_nothing(data: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for condition in ("step:2:SIGTERM", "step:3:SIGUSR1", "step:4:SIGINT", "evaluation:1:SIGHUP"):
        assert start(data, run, condition) == 75, condition
    assert run_state.load_state(run / "last.state")["position"]["step"] == LAST_STEP
    assert start(data, run, "never") == 0
    assert_same_end(run, uninterrupted)


def two_processes(data: Path, run: Path, condition: str, **variables: str) -> list[subprocess.Popen[str]]:
    """Two ranks; `condition` is the second one's."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "KILL_RANK": "1"}
    command = [sys.executable, str(Path(__file__).parent.parent / "training_runs.py"), str(data), str(run), condition]
    return [
        subprocess.Popen(
            command,
            env={**environment(), **common, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
def test_processes_stop_together_where_one_of_them_gets_the_signal(tmp_path: Path) -> None:
    scene_folder, run = scenes(tmp_path / "data"), tmp_path / "run"
    for process in two_processes(scene_folder, run, "step:3:SIGUSR1"):
        output, errors = process.communicate(timeout=180)
        assert process.returncode == 75, errors[-2000:]
        assert output.splitlines()[-1] == "stopped by SIGUSR1 after step 3, the state is saved"
    assert sorted(losses(run)) == [1, 2, 3]
    state = run_state.load_state(run / "last.state")
    assert state["position"]["step"] == 3
    first, second = (torch.Generator().set_state(one["torch"]).initial_seed() for one in state["random"])
    assert first != second  # dropout differs between the processes


@pytest.mark.slow
def test_processes_stop_together_where_torchrun_gets_the_signal(tmp_path: Path) -> None:
    scene_folder, run = scenes(tmp_path / "data"), tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [str(Path(__file__).parent.parent / "training_runs.py"), str(scene_folder), str(run), "step:3:SIGTERM"]
    variables = {**environment(), "KILL_RANK": "1", "SIGNAL_PARENT": "1"}
    found = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=180)
    assert found.returncode != 0
    assert found.stdout.count("stopped by SIGTERM after step ") == 2
    state = run_state.load_state(run / "last.state")
    assert state["position"]["step"] in (3, 4) and len(state["random"]) == 2


@pytest.mark.slow
def test_a_loss_of_one_process_that_is_not_finite_ends_all_of_them_and_names_its_images(tmp_path: Path) -> None:
    scene_folder, run = scenes(tmp_path / "data"), tmp_path / "run"
    for process in two_processes(scene_folder, run, "nan:3", TEST_TIMEOUT="15"):
        output, errors = process.communicate(timeout=180)
        assert process.returncode == 2, errors[-2000:]
        assert output.splitlines()[-1].startswith("step 3: the loss is not finite, the step was left out; images: ")
    (record,) = (json.loads(line) for line in (run / "nonfinite.jsonl").read_text().splitlines())
    assert (record["rank"], record["step"]) == (1, 3)
    assert len(record["samples"]) == 2 and all(sample["image"] in output for sample in record["samples"])


@pytest.mark.slow
def test_a_save_that_takes_longer_than_the_timeout_is_not_taken_for_a_lost_process(tmp_path: Path) -> None:
    scene_folder, run = scenes(tmp_path / "data"), tmp_path / "run"
    for process in two_processes(scene_folder, run, "slow:25", KILL_RANK="0", TEST_TIMEOUT="15"):
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-2000:]
    assert sorted(losses(run)) == list(range(1, LAST_STEP // 2 + 1))


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "what"), [("SIGSTOP", "did not answer in time"), ("SIGKILL", "has ended")])
def test_the_other_processes_name_one_that_is_lost(sent: str, what: str, tmp_path: Path) -> None:
    first, second = two_processes(scenes(tmp_path / "data"), tmp_path / "run", f"step:3:{sent}", TEST_TIMEOUT="15")
    try:
        output, errors = first.communicate(timeout=180)
        assert first.returncode == 2, errors[-2000:]
        assert output.splitlines()[-1].startswith(f"process 1 of 2 {what}")
    finally:
        second.kill()
        second.communicate()
