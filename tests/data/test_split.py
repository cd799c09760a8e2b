"""`data split`: by image, each category in proportion, the same every time."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from groundingdino.data.formats.registry import read, read_splits
from groundingdino.data.split import plan, split


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """200 images: half with a cat, a tenth with a dog, five with a fox."""
    images, boxes = [], []
    for number in range(200):
        images.append({"id": number, "file_name": f"{number:03d}.jpg", "width": 90, "height": 90})
        for category, every in ((1, 2), (2, 10), (3, 40)):
            if number % every == 0:
                boxes.append({"id": len(boxes), "image_id": number, "category_id": category, "bbox": [1, 1, 50, 50]})
    names = [{"id": n, "name": name} for n, name in enumerate(("cat", "dog", "fox"), start=1)]
    (tmp_path / "in.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": names}))
    return tmp_path / "in.json"


def test_every_image_is_in_one_part_and_every_category_in_proportion(data: Path, tmp_path: Path):
    written = split(data, (0.6, 0.2, 0.2), tmp_path / "out")
    assert written.counts == {"train": 120, "val": 40, "test": 40}
    splits = read_splits(tmp_path / "out")
    files = [entry.file_name for reading in splits.values() for entry in reading]
    assert len(files) == len(set(files)) == 200
    counts = {name: Counter(t.name for e in reading for t in e.objects) for name, reading in splits.items()}
    assert counts["train"] == {"cat": 60, "dog": 12, "fox": 3}
    assert counts["val"] == counts["test"] == {"cat": 20, "dog": 4, "fox": 1}
    assert dict(splits["val"].categories) == {1: "cat", 2: "dog", 3: "fox"}


def test_the_same_images_give_the_same_parts_in_any_order(data: Path, tmp_path: Path):
    document = json.loads(data.read_text())
    random.Random(1).shuffle(document["images"])
    (tmp_path / "shuffled.json").write_text(json.dumps(document))
    first, second = (plan(read(path), (0.8, 0.2), seed=7) for path in (data, tmp_path / "shuffled.json"))
    assert first.part_of == second.part_of
    assert plan(read(data), (0.8, 0.2), seed=8).part_of != first.part_of


def test_captions_of_one_image_stay_together(golden: Path, tmp_path: Path):
    source = golden / "data" / "mdetr_annotations" / "finetune_refcoco_train_vg.json"
    split(source, (0.5, 0.5), tmp_path / "out")
    parts = [{entry.file_name for entry in reading} for reading in read_splits(tmp_path / "out").values()]
    assert parts[0] and parts[1] and not parts[0] & parts[1]
    lines = [(tmp_path / "out" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "val")]
    assert sorted(lines[0] + lines[1]) == sorted(source.read_text().splitlines())


@pytest.mark.parametrize("shares", [(0.8, 0.1), (1.2, -0.2), (0.25, 0.25, 0.25, 0.25)])
def test_shares_that_are_none_are_refused(data: Path, tmp_path: Path, shares: tuple):
    with pytest.raises(ValueError, match="expected one to three positive numbers that sum to 1"):
        split(data, shares, tmp_path / "out")


def test_what_is_split_already_is_not_split_again(data: Path, tmp_path: Path):
    split(data, (0.5, 0.5), tmp_path / "out")
    with pytest.raises(ValueError, match="split already"):
        split(tmp_path / "out", (0.5, 0.5), tmp_path / "again")
