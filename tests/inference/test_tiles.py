"""Tiles: where they lie, that one tile is no tile, and what merging makes of boxes found twice."""

import numpy as np
import pytest
import torch
from golden_cases import tiny_model
from PIL import Image

from groundingdino.inference.engine import RankedBoxes
from groundingdino.inference.predictor import Predictor
from groundingdino.inference.prompts import Categories, Referring
from groundingdino.inference.tiles import Tiles, merge_tiles, slice_image, starts


@pytest.fixture(scope="module")
def predictor():
    return Predictor(tiny_model(), scale=(96, 160))


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((150, 100), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("length", "side", "overlap"), [(1000, 100, 0.2), (101, 100, 0.0), (257, 64, 0.5), (9, 64, 0.2)]
)
def test_tiles_cover_a_side_and_overlap_as_asked(length, side, overlap):
    places = starts(length, Tiles(side, overlap))
    assert places[0] == 0 and places[-1] == max(0, length - side)
    for left, right in zip(places, places[1:], strict=False):
        assert left < right and left + side - right >= int(overlap * side)


def test_an_image_of_one_tile_is_answered_as_without_tiles(predictor, image):
    plain = predictor.predict(image, categories=["cat", "dog"], threshold=0.0)
    tiled = predictor.predict(image, categories=["cat", "dog"], threshold=0.0, tiles=150)
    assert torch.equal(plain.boxes, tiled.boxes) and torch.equal(plain.scores, tiled.scores)
    assert plain.names == tiled.names


def test_each_tile_is_answered_as_an_image_of_its_own_and_shifted_back(predictor, image):
    found = predictor.predict(image, categories=["cat"], threshold=0.0, tiles=Tiles(100, 0.2), top_k=2000)
    assert [(part.left, part.top) for part in slice_image(image, Tiles(100, 0.2), (96, 160))] == [(0, 0), (50, 0)]
    parts = [
        predictor.predict(image.crop((left, 0, left + 100, 100)), categories=["cat"], threshold=0.0, top_k=2000)
        for left in (0, 50)
    ]
    shifted = torch.cat([parts[0].boxes, parts[1].boxes + torch.tensor([50.0, 0, 50, 0])])
    assert len(found.boxes) and {tuple(box) for box in found.boxes.tolist()} <= {tuple(box) for box in shifted.tolist()}
    assert float(found.boxes[:, 2].max()) > 100 and float(found.boxes[:, 2].max()) <= 150
    assert torch.equal(found.scores[:1], torch.cat([part.scores for part in parts]).max()[None])


def test_tiles_that_run_together_are_answered_as_one_after_the_other(predictor, image, monkeypatch):
    options = {"categories": ["cat"], "threshold": 0.0, "tiles": 100, "top_k": 2000}
    monkeypatch.setattr(predictor.engine, "pairs_per_pass", 1)
    alone = predictor.predict(image, **options)
    monkeypatch.setattr(predictor.engine, "pairs_per_pass", 4)
    together = predictor.predict(image, **options)
    torch.testing.assert_close(together.scores, alone.scores, atol=1e-5, rtol=0)
    apart = torch.cdist(together.boxes, alone.boxes, p=float("inf"))
    assert max(apart.amin(dim=0).max(), apart.amin(dim=1).max()) < 0.01  # near ties may swap places


def parts_of_two_tiles() -> list[RankedBoxes]:
    left = RankedBoxes(
        torch.tensor([[0.0, 0, 10, 10], [50, 0, 60, 10]]), torch.tensor([0.8, 0.3]), torch.tensor([0, 0])
    )
    right = RankedBoxes(torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 10]]), torch.tensor([0.4, 0.2]), torch.tensor([0, 1]))
    return [left, right]


def test_merging_keeps_the_best_box_of_an_object_within_each_name():
    merged = merge_tiles(parts_of_two_tiles(), Tiles(100))
    assert torch.allclose(merged.scores, torch.tensor([0.8, 0.3, 0.2])) and merged.labels.tolist() == [0, 0, 1]
    assert merged.boxes[0].tolist() == [0, 0, 10, 10]


def test_fusion_takes_the_mean_weighted_by_score():
    merged = merge_tiles(parts_of_two_tiles(), Tiles(100, merge="fusion"))
    assert merged.boxes[0].tolist() == pytest.approx([0, 0, 10, (0.8 * 10 + 0.4 * 8) / 1.2])
    torch.testing.assert_close(merged.boxes[1:], torch.tensor([[50.0, 0, 60, 10], [0, 0, 10, 10]]))
    assert merged.labels.tolist() == [0, 0, 1]


def test_every_image_of_a_list_has_its_own_prompt_with_tiles_too(predictor, image):
    found = predictor.predict([image, image], [Categories(["cat"]), Referring("a dog")], tiles=64, threshold=0.0)
    assert set(found[0].names) == {"cat"} and found[1].names == ("a dog",)


def test_tiles_that_make_no_sense_are_refused(predictor, image):
    with pytest.raises(ValueError, match="tiles of 0 pixels"):
        predictor.predict(image, categories=["cat"], tiles=0)
    with pytest.raises(ValueError, match="overlap 1.5"):
        Tiles(100, 1.5)
    with pytest.raises(ValueError, match="use nms or fusion"):
        Tiles(100, merge="soft")
    with pytest.raises(ValueError, match="cannot be sliced"):
        predictor.predict(predictor.encode_image(image), categories=["cat"], tiles=64)
