"""Images of rare categories are shown more often."""

import json
from pathlib import Path

import numpy as np

from groundingdino.data import BatchPlan, TrainingSource, load_training


def source(folder: Path, labels: list[list[int]], threshold: float) -> TrainingSource:
    lines = []
    for number, own in enumerate(labels):
        instances = [{"bbox": [1, 1, 9, 9], "label": label, "category": "x"} for label in own]
        line = {"filename": f"{number}.jpg", "height": 10, "width": 10, "detection": {"instances": instances}}
        lines.append(json.dumps(line))
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "map.json").write_text(json.dumps({"0": "cell", "1": "platelet", "2": "parasite"}))
    annotations = load_training(folder / "train.jsonl", folder / "map.json")
    return TrainingSource(annotations, folder, repeat_threshold=threshold)


def test_repeat_factors_are_lvis_and_rounded_up(tmp_path: Path) -> None:
    labels = [[0]] * 7 + [[0, 1]] * 2 + [[0, 2]]  # shares 1.0, 0.2 and 0.1
    assert source(tmp_path, labels, 0.0).repeats() is None
    found = source(tmp_path, labels, 0.4).repeats()
    assert found is not None and found.tolist() == [1] * 7 + [2] * 2 + [2]  # sqrt(0.4 / 0.2) = 1.4, sqrt(0.4 / 0.1) = 2
    found = source(tmp_path, labels, 0.9).repeats()
    assert found is not None and found.tolist() == [1] * 7 + [3] * 2 + [3]  # 2.1 and 3
    empty = source(tmp_path, [[], [0]], 0.9).repeats()
    assert empty is not None and empty.tolist() == [1, 2]  # nothing in an image is nothing rare


def test_an_epoch_holds_repeated_entries_as_copies_of_their_own() -> None:
    portrait, repeats = [np.zeros(3, bool), np.zeros(2, bool)], [np.array([1, 3, 1]), None]
    indices, copies = BatchPlan(portrait, [1.0, 2.0], 3, repeats=repeats).plan(0)
    drawn = sorted(zip(indices.ravel().tolist(), copies.ravel().tolist(), strict=True))
    assert drawn == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (3, 0), (3, 1), (4, 0), (4, 1)]
    doubled, copies = BatchPlan(portrait[:1], [2.0], 5, repeats=repeats[:1]).plan(0)
    assert np.bincount(doubled.ravel()).tolist() == [2, 6, 2]
    assert len(set(zip(doubled.ravel().tolist(), copies.ravel().tolist(), strict=True))) == 10
