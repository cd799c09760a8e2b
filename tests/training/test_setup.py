"""What a run starts with."""

import dataclasses
from pathlib import Path

import protocol_data

from groundingdino.config import DataConfig
from groundingdino.training.setup import training_sources


def test_rare_categories_are_repeated_where_the_config_says_so(tmp_path: Path) -> None:
    protocol_data.coco(tmp_path)  # three images, one of them with both categories
    file, images = "annotations/instances_val2017.json", "val2017"
    data = DataConfig(root=tmp_path, train_files=(file,), image_dirs=(images,), label_maps=("",))
    (source,) = training_sources(data)
    assert source.repeats() is None
    (source,) = training_sources(dataclasses.replace(data, repeat_threshold=1.0))
    repeats = source.repeats()
    assert repeats is not None and repeats.tolist() == [2, 2, 2]
