"""The drawer: what must be visible, at any size."""

import numpy as np
import pytest
import torch
from PIL import Image

from groundingdino.inference import visualize
from groundingdino.inference.visualize import color_of, draw_comparison, draw_detections
from groundingdino.structures import Detections

GRAY = (128, 128, 128)


def detections(boxes, names):
    scores = torch.linspace(0.9, 0.1, len(boxes))
    return Detections(torch.tensor(boxes).float().reshape(-1, 4), scores, torch.arange(len(boxes)), tuple(names))


def pixels_of(picture, color):
    return (np.array(picture) == color).all(-1)


@pytest.fixture
def labels(monkeypatch):
    """Every label that is drawn: (place, text). A picture does not say where its letters are, so this looks inside."""
    drawn = []
    original = visualize._label

    def kept(pen, place, text, color, font):
        drawn.append((place, text))
        original(pen, place, text, color, font)

    monkeypatch.setattr(visualize, "_label", kept)
    return drawn


def test_a_box_is_outlined_in_its_names_colour_and_the_image_is_left_alone():
    image = Image.new("RGB", (200, 150), GRAY)
    picture = draw_detections(image, detections([[20, 40, 120, 130]], ["cat"]))
    assert picture.size == image.size and image.getcolors() == [(200 * 150, GRAY)]
    colored = pixels_of(picture, color_of("cat"))
    assert colored[40, 25:115].all() and colored[130, 25:115].all()
    assert colored[45:125, 20].all() and colored[45:125, 120].all()
    assert not colored[60:120, 40:100].any()


def test_a_name_has_the_same_colour_everywhere_and_names_differ():
    assert len({color_of(f"thing {i}") for i in range(50)}) > 40
    assert color_of("cat") == color_of("cat") != color_of("dog")


@pytest.mark.parametrize("size", [(40, 30), (120, 90), (640, 480), (2600, 1300)])
def test_labels_are_readable_inside_and_never_cover_each_other(size, labels):
    width, height = size
    boxes = [[width * 0.2, height * 0.2, width * 0.8 - i, height * 0.8 + i] for i in range(4)]
    boxes += [[0, 0, width, height]]
    picture = draw_detections(Image.new("RGB", size, GRAY), detections(boxes, ["a", "b", "c", "d", "the whole"]))
    assert picture.width >= width and picture.height >= height
    numbers = [text for _, text in labels if text.isdigit()]
    assert (picture.height > height) == bool(numbers)
    for index, (place, text) in enumerate(labels):
        assert place[3] - place[1] >= visualize.SMALLEST_FONT
        assert place[0] >= 0 and place[1] >= 0 and place[3] <= max(height, 20)
        if not text.isdigit():
            assert not any(visualize.overlap(place, other) for other, _ in labels[:index])


def test_crowded_labels_become_numbers_with_a_legend_below(labels):
    names = [f"a rather long name {i}" for i in range(12)]
    image = Image.new("RGB", (300, 200), GRAY)
    picture = draw_detections(image, detections([[100, 80, 200, 120]] * 12, names))
    moved = [text for _, text in labels if text.isdigit()]
    assert moved == [str(i + 1) for i in range(len(moved))] and len(moved) >= 4
    legend = np.array(picture)[200:]
    for name in names[-len(moved) :]:
        assert (legend == color_of(name)).all(-1).sum() >= 50


@pytest.mark.parametrize("count", [12, 13, 14, 15])
def test_a_legend_of_several_columns_shows_each_entry_at_any_width(count, labels):
    names = [f"n{i}" for i in range(count)]
    for width in range(200, 360, 4):
        labels.clear()
        image = Image.new("RGB", (width, 100), GRAY)
        picture = draw_detections(image, detections([[100, 40, 200, 60]] * count, names))
        moved = sum(text.isdigit() for _, text in labels)
        legend = np.array(picture)[100:]
        for name in names[-moved:]:
            assert (legend == color_of(name)).all(-1).sum() >= 50
        assert moved >= 4 and len(legend) < moved * visualize.SMALLEST_FONT  # several to a line


def test_larger_pictures_have_larger_labels(labels):
    for size in ((400, 300), (4000, 3000)):
        draw_detections(Image.new("RGB", size), detections([[100, 100, 200, 200]], ["cat"]))
    (small, _), (large, _) = labels
    assert large[3] - large[1] > 5 * (small[3] - small[1])


def test_boxes_outside_and_no_boxes_are_drawn_without_harm():
    image = Image.new("RGB", (100, 80), GRAY)
    assert draw_detections(image, detections([], [])).tobytes() == image.tobytes()
    picture = draw_detections(image, detections([[-50, -50, 500, 500], [300, 300, 400, 400]], ["a", "b"]))
    assert pixels_of(picture, color_of("a")).any()


def test_a_small_picture_can_be_drawn_larger(labels):
    assert [visualize.comfortable_factor(size) for size in ((96, 60), (399, 10), (400, 400), (4000, 9))] == [5, 2, 1, 1]
    image = Image.new("RGB", (96, 60), GRAY)
    picture = draw_detections(image, detections([[10, 20, 50, 50]], ["the red circle"]), enlarge=5)
    assert picture.size == (480, 300)
    colored = pixels_of(picture, color_of("the red circle"))
    assert colored[105:245, 50].all() and colored[105:245, 250].all() and colored[250, 55:245].all()
    assert [text for _, text in labels] == ["the red circle 0.90"]


def test_a_very_long_name_is_cut(labels):
    picture = draw_detections(Image.new("RGB", (900, 600)), detections([[100, 100, 300, 300]], ["word " * 80]))
    assert picture.width == 900 and labels[0][1].endswith("… 0.90")


def test_a_comparison_shows_truth_left_and_prediction_right():
    image = Image.new("RGB", (200, 150), GRAY)
    truth = detections([[20, 40, 120, 130]], ["cat"])
    picture = draw_comparison(image, truth, detections([[30, 50, 110, 120]], ["cat"]))
    half = picture.width // 2
    assert picture.width > 800 and picture.height > 300  # both enlarged
    green, own = pixels_of(picture, visualize.TRUTH_COLOR), pixels_of(picture, color_of("cat"))
    assert green[:, :half].any() and not green[:, half:].any()
    assert own[:, half:].any() and not own[:, :half].any()
