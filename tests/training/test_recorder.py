"""Lines of metrics.jsonl."""

import json
import time
from pathlib import Path

import pytest

from groundingdino.training.recorder import MetricsLog, StepValues
from groundingdino.training.run_folder import RunFolder


def test_the_speed_is_that_since_the_last_line_without_what_was_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    log, found = MetricsLog(RunFolder(tmp_path), 0), []
    for number, (seconds, images, left_out) in enumerate([(1.0, 2, 0.0), (2.0, 2, 50.0), (4.0, 12, 0.0)], start=1):
        now[0] += seconds
        found.append(log.steps([StepValues(number, 0, 1e-3, images, {"loss": 1.0}, 1.0, 1.0, samples=())]))
        if left_out:  # an evaluation
            now[0] += left_out
            log.skip_time()
    assert found == pytest.approx([2.0, 1.0, 3.0])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["images_per_second"] for row in rows] == pytest.approx(found)
