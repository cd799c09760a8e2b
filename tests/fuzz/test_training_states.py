"""Whatever a training state holds, the run goes on, or one line says what is wrong and the state is left as it was."""

from pathlib import Path

import pytest
import torch
from fuzz.fuzzing import ODD_VALUES, damaged, damaged_bytes, outcome, run_cases
from hypothesis import strategies as st
from training_runs import scenes, small_config

from groundingdino.checkpoints import run_state
from groundingdino.training.nonfinite import NonFiniteLossError
from groundingdino.training.stop import RunStopped, StopRequest
from groundingdino.training.trainer import fit

CASES = 15
TENSORS = [
    torch.zeros(0),
    torch.zeros(3, 4),
    torch.tensor(5),
    torch.ones(16, dtype=torch.int64),
    torch.full((64,), float("nan")),
    torch.zeros(64, dtype=torch.bool),
    torch.zeros(5056, dtype=torch.uint8),
]


class StopAfterOneStep(StopRequest):
    """Wants the run to end once it has begun to go on."""

    asked = 0

    def reason(self) -> str | None:
        self.asked += 1
        return "the test" if self.asked > 1 else None


def test_any_state_goes_on_or_is_refused(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    data, run = scenes(tmp_path / "data"), tmp_path / "run"
    config = small_config(data, run, resume="auto")

    def go_on() -> str:
        try:
            fit(config, stop=StopAfterOneStep())
        except RunStopped as end:
            return str(end)
        return "finished"

    assert go_on().startswith("stopped by the test after step 1")
    whole = run_state.load_state(run / "last.state")
    content = (run / "last.state").read_bytes()

    def check(case: object) -> None:
        if isinstance(case, bytes):
            (run / "last.state").write_bytes(case)
        else:
            try:
                run_state.save_state(run / "last.state", case)  # type: ignore[arg-type]
            except (ValueError, TypeError, AttributeError, UnicodeEncodeError):  # no state that could be written
                return
        before = (run / "last.state").read_bytes()
        if outcome(go_on, refusals=(ValueError, NonFiniteLossError)) is None:
            assert (run / "last.state").read_bytes() == before

    values = st.one_of(st.sampled_from(range(len(TENSORS))).map(TENSORS.__getitem__), st.sampled_from(ODD_VALUES))
    run_cases(request, st.one_of(damaged(whole, values), damaged_bytes(content, busy=20_000)), check, CASES)
