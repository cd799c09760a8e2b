"""The quick start's data."""

from pathlib import Path

import pytest
from training_runs import scenes, small_config

from groundingdino.training import quickstart


@pytest.mark.parametrize("main", [False, True])
def test_the_main_process_renders_and_all_wait_for_it(
    main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path / "data", tmp_path / "run")
    rendered: list[bool] = []  # at each wait
    monkeypatch.setattr(quickstart, "write_dataset", scenes)  # fewer than the quick start's
    monkeypatch.setattr(quickstart.distributed, "is_main", lambda: main)
    shuffled = config.data.root / quickstart.SHUFFLED
    monkeypatch.setattr(quickstart.distributed, "barrier", lambda: rendered.append(shuffled.exists()))
    quickstart.make_data(config)
    assert rendered == [main]
