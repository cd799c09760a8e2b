"""Batches that are padded to few shapes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from training_runs import scenes, small_config

from groundingdino.data import Padding, padding_for
from groundingdino.runtime.distributed import World
from groundingdino.training.setup import training_loader


def test_sides_lead_over_the_largest_short_side_to_the_largest_long_one():
    assert padding_for(4, (480, 800), 1333) == Padding((800, 1344), 16)
    assert padding_for(16, (480, 800), 1333) == Padding((640, 800, 1088, 1344), 16)
    assert padding_for(35, (480, 800), 1333).sides == padding_for(25, (480, 800), 1333).sides  # 5 by 5
    with pytest.raises(ValueError, match="data.size_buckets is 3: use at least 4"):
        padding_for(3, (480, 800), 1333)


def test_size_buckets_leave_few_shapes_and_the_same_images(tmp_path: Path):
    config = small_config(scenes(tmp_path), tmp_path)
    data = dataclasses.replace(config.data, crop_probability=1.0)
    world = World(0, 0, 1, torch.device("cpu"))
    loaders = [
        training_loader(
            dataclasses.replace(config, data=dataclasses.replace(data, size_buckets=n)), config.model, world
        )
        for n in (0, 4)
    ]
    plain, padded = (list(loader) + list(loader) for loader in loaders)
    shapes = [{tuple(batch.images.pixels.shape[2:]) for batch in batches} for batches in (plain, padded)]
    assert len(shapes[0]) > 4 and len(shapes[1]) <= 4
    assert {batch.text.token_ids.shape[1] % 16 for batch in padded} == {0}
    for small, large in zip(plain, padded, strict=True):
        height, width = small.images.pixels.shape[2:]
        assert torch.equal(large.images.pixels[..., :height, :width], small.images.pixels)
        assert large.images.valid.sum(dim=(1, 2)).tolist() == small.images.valid.sum(dim=(1, 2)).tolist()
        assert large.images.padded == (not large.images.valid.all())
        assert torch.equal(large.text.valid.sum(dim=1), small.text.valid.sum(dim=1))
