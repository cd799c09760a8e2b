"""Augmentation, prompts and samples of training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from groundingdino.data import (
    Augmentation,
    BadSampleError,
    Draw,
    GroundingDataset,
    SampleLimits,
    TrainingSource,
    captions,
    load_odvg,
)
from groundingdino.data.augmentation import augment
from groundingdino.data.batch import collate
from groundingdino.inputs import text
from groundingdino.inputs.images import collate_images

GOLDEN = Path(__file__).parent.parent / "golden" / "data"
TOKENIZER = text.CaptionTokenizer()
SMALL = Augmentation(short_sides=(32, 40), longest_side=64, crop_probability=0.0)


def write_source(
    folder: Path, *lines: dict, label_map: dict | None = None, size: tuple[int, int] = (60, 40)
) -> TrainingSource:
    """A data set whose images, where not there yet, are noise of `size` (width, height)."""
    for line in lines:
        if not (folder / line["filename"]).exists():
            Image.effect_noise(size, 80).convert("RGB").save(folder / line["filename"])
    (folder / "train.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return TrainingSource(load_odvg(folder / "train.json", label_map), folder)


def grounding(caption: str, *regions: tuple[list, list], filename: str = "a.png", size: tuple[int, int] = (60, 40)):
    """An ODVG line: regions are (box, spans)."""
    rows = [{"bbox": box, "phrase": "", "tokens_positive": spans} for box, spans in regions]
    content = {"caption": caption, "regions": rows}
    return {"filename": filename, "width": size[0], "height": size[1], "grounding": content}


class Draws:
    """A random generator that plays back what was drawn elsewhere."""

    def __init__(self, uniform: list[float], integers: list[int]):
        self.uniform, self.ints = uniform, integers

    def random(self) -> float:
        return self.uniform.pop(0)

    def integers(self, low: int, high: int | None = None) -> int:
        value = self.ints.pop(0)
        assert (0 if high is None else low) <= value < (low if high is None else high)
        return value


class TestAugmentation:
    def test_with_mmdets_draws_sizes_and_boxes_are_mmdets_to_the_last_bit(self):
        config = Augmentation()
        cases = json.loads((GOLDEN / "train_augmentation.json").read_text())["cases"]
        assert sum(bool(case["crop"]) for case in cases) > 20
        assert any(case["boxes"] and not case["kept"] for case in cases)
        for case in cases:
            integers = [config.short_sides.index(case["short_side"])]
            if case["crop"]:
                x, y, width, height = case["crop"]["window"]
                before = config.short_sides_before_crop.index(case["crop"]["short_side"])
                integers = [before, height, width, y, x, *integers]
            draws = Draws([0.5, 0.0 if case["crop"] else 0.9], integers)
            width, height = case["size"]
            boxes = torch.tensor(case["boxes"]).reshape(-1, 4)
            view = augment(torch.zeros(3, height, width, dtype=torch.uint8), boxes, config, draws)
            assert [view.image.shape[2], view.image.shape[1]] == case["result_size"]
            assert view.kept.tolist() == case["kept"]
            assert torch.equal(view.boxes, torch.tensor(case["result_boxes"]).reshape(-1, 4))

    def test_sizes_are_the_recipes_and_both_branches_are_taken_equally_often(self):
        config = Augmentation()
        generator = np.random.default_rng(0)
        image = torch.zeros(3, 427, 640, dtype=torch.uint8)
        whole = 0
        for _ in range(200):
            view = augment(image, torch.zeros(0, 4), config, generator)
            h, w = view.image.shape[1:]
            assert min(h, w) in config.short_sides or max(h, w) == 1333
            whole += abs(w / h - 640 / 427) < 0.003
        assert 60 < whole < 140

    def test_boxes_follow_the_pixels_that_they_surround(self):
        config = Augmentation(
            short_sides=(80, 96), longest_side=200, short_sides_before_crop=(60, 72), crop_sides=(40, 56)
        )
        image = torch.zeros(3, 50, 70, dtype=torch.uint8)
        image[:, 20:30, 30:50] = 255
        generator = np.random.default_rng(1)
        cut, whole = 0, 0
        for _ in range(100):
            view = augment(image, torch.tensor([[30.0, 20, 50, 30]]), config, generator)
            bright = (view.image[0] > 127).nonzero()
            if len(view.boxes) == 0:
                assert len(bright) == 0
                continue
            low, high = bright.amin(dim=0).flip(0), bright.amax(dim=0).flip(0) + 1
            assert (view.boxes[0] - torch.cat([low, high])).abs().max() < 1.6
            on_border = (high == torch.tensor(view.image.shape[:0:-1])) | (low == 0)
            cut, whole = cut + bool(on_border.any()), whole + bool(~on_border.any())
        assert cut > 5 and whole > 5

    def test_an_object_that_is_cropped_away_leaves_the_image_in_the_batch_without_objects(self, tmp_path: Path):
        config = Augmentation((64,), 128, crop_probability=1.0, short_sides_before_crop=(80,), crop_sides=(16, 20))
        source = write_source(tmp_path, grounding("red cup", ([0, 0, 4, 4], [[0, 7]])))
        dataset = GroundingDataset([source], config)
        samples = [dataset[Draw(0, epoch, 0)] for epoch in range(20)]
        assert {len(sample.boxes) for sample in samples} == {0, 1}
        empty = next(sample for sample in samples if len(sample.boxes) == 0)
        assert empty.info.caption == "red cup. " and empty.problems == ()
        targets = collate([empty]).targets
        assert targets.counts == (0,) and targets.boxes.shape == (1, 1, 4) and not targets.valid.any()

    def test_boxes_are_clipped_to_the_image_and_thin_ones_dropped(self):
        boxes = torch.tensor([[-10.0, -5, 70, 50], [59.999, 0, 61, 40], [10, 10, 20, 20]])
        config = Augmentation((40,), 1333, crop_probability=0.0)
        view = augment(torch.zeros(3, 40, 60, dtype=torch.uint8), boxes, config, np.random.default_rng(0))
        assert view.kept.tolist() == [0, 2]
        assert view.boxes.tolist() == [[0, 0, 60, 40], [10, 10, 20, 20]]

    def test_nothing_is_flipped_unless_asked(self):
        image = torch.arange(60, dtype=torch.uint8).expand(3, 40, 60)
        boxes = torch.tensor([[5.0, 1, 15, 9]])
        config = Augmentation((40,), 1333, crop_probability=0.0)
        plain = [augment(image, boxes, config, np.random.default_rng(n)) for n in range(20)]
        assert not any(view.flipped for view in plain)
        config = Augmentation((40,), 1333, crop_probability=0.0, flip_probability=1.0)
        view = augment(image, boxes, config, np.random.default_rng(0))
        assert view.flipped and view.boxes.tolist() == [[45, 1, 55, 9]]
        assert torch.equal(view.image, image.flip(2))


class TestPrompts:
    @pytest.mark.parametrize(
        ("caption", "expected"),
        [
            ("the man left of the Right car", "the man right of the Left car"),
            ("leftmost, RIGHT-hand and lefty", "rightmost, LEFT-hand and righty"),
            ("an upright leftover, righteous", "an upright leftover, righteous"),
        ],
    )
    def test_a_flip_swaps_left_and_right(self, caption: str, expected: str):
        assert captions.swap_sides(caption, ()) == (expected, ())
        assert captions.swap_sides(expected, ())[0] == caption

    def test_spans_move_along_with_swapped_words(self):
        caption = "left cup, the right dog left"
        spans = (((0, 8),), ((10, 13), (20, 23)), ((14, 19),), ((24, 28),))
        swapped, moved = captions.swap_sides(caption, spans)
        words = [[swapped[start:end] for start, end in pieces] for pieces in moved]
        assert words == [["right cup"], ["the", "dog"], ["left"], ["right"]]

    def test_grounding_captions_are_lower_cased_stripped_and_closed_and_spans_still_fit(self):
        caption, spans = captions.grounding_caption("  Red CUP ", (((2, 5),), ((6, 10),), ((0, 2),)))
        assert caption == "red cup. "
        assert [[caption[start:end] for start, end in pieces] for pieces in spans] == [["red"], ["cup"], []]
        assert captions.grounding_caption("Done.", ())[0] == "done."
        assert captions.grounding_caption("İstanbul cup", (((9, 12),),)) == ("İstanbul cup. ", (((9, 12),),))

    def test_category_prompts_hold_every_category_of_the_image_and_fit_the_budget(self):
        label_map = {10 * n: f"Category_{n} of things (sort {n})" for n in range(200)}
        sizes = set()
        for seed in range(30):
            draw = captions.draw_categories([50, 1990, 50], label_map, TOKENIZER, np.random.default_rng(seed))
            encoded = TOKENIZER.encode(draw.caption)
            assert len(encoded.token_ids) <= 256
            assert set(draw.places) == {50, 1990}
            for label, place in draw.places.items():
                ((start, end),) = draw.spans[place]
                assert draw.caption[start:end] == f"category {label // 10} of things "
            names = [draw.caption[start:end] for ((start, end),) in draw.spans]
            assert len(set(names)) == len(names)
            sizes.add(len(names))
        assert len(sizes) > 5 and max(sizes) <= 87

    def test_half_of_the_prompts_draw_all_negatives(self):
        label_map = dict(enumerate("abcdefghijklmnopqrst"))
        generator = np.random.default_rng(0)
        full = sum(len(captions.draw_categories([], label_map, TOKENIZER, generator).spans) == 20 for _ in range(400))
        assert 160 < full < 270  # half of them, and one in twenty of the others

    def test_alternatives_are_drawn_anew_each_time_and_the_label_map_stays(self):
        label_map = {0: "Sofa/Couch", 1: "dog"}
        draws = [captions.draw_categories([0], label_map, TOKENIZER, np.random.default_rng(n)) for n in range(30)]
        assert {draw.caption[slice(*draw.spans[draw.places[0]][0])] for draw in draws} == {"sofa", "couch"}
        assert label_map == {0: "Sofa/Couch", 1: "dog"}

    def test_of_too_many_categories_a_random_part_is_kept(self):
        label_map = {n: " ".join(["thing"] * 40) for n in range(10)}
        draws = [captions.draw_categories(range(10), label_map, TOKENIZER, np.random.default_rng(n)) for n in range(9)]
        assert all(len(draw.places) == 6 for draw in draws)  # 6 * (40 + 1) <= 254
        assert len({tuple(sorted(draw.places)) for draw in draws}) > 3


class TestSamples:
    def test_a_sample_is_a_function_of_seed_epoch_index_and_copy_alone(self, tmp_path: Path):
        source = write_source(
            tmp_path, *[grounding("cup", ([1, 1, 30, 30], [[0, 3]]), filename=f"{n}.png") for n in (1, 2)]
        )
        config = Augmentation(tuple(range(32, 96)), 200, short_sides_before_crop=(40, 50), crop_sides=(24, 48))
        first, second = (GroundingDataset([source], config, seed=3) for _ in range(2))
        second[Draw(1, 5, 0)]
        assert torch.equal(first[Draw(0, 2, 0)].image, second[Draw(0, 2, 0)].image)
        others = [Draw(1, 2, 0), Draw(0, 3, 0), Draw(0, 2, 1)]
        shapes = {tuple(first[draw].image.shape) for draw in [Draw(0, 2, 0), *others]}
        shapes.add(tuple(GroundingDataset([source], config, seed=4)[Draw(0, 2, 0)].image.shape))
        assert len(shapes) == 5

    def test_targets_point_from_normalised_boxes_to_the_tokens_of_their_phrase(self, tmp_path: Path):
        line = grounding(
            "Red cup and a Saucer", ([0, 0, 30, 20], [[0, 7]]), ([[30, 20, 60, 40], [0, 20, 30, 40]], [[12, 20]])
        )
        sample = GroundingDataset([write_source(tmp_path, line)], SMALL)[Draw(0, 0, 0)]
        short = grounding("dog", filename="b.png")
        (tmp_path / "b").mkdir()
        other = GroundingDataset([write_source(tmp_path / "b", short)], SMALL)[Draw(0, 0, 0)]
        batch = collate([sample, other])
        assert batch.targets.counts == (3, 0)
        assert batch.targets.labels[0].tolist() == [0, 1, 1]
        torch.testing.assert_close(batch.targets.boxes[0, 0], torch.tensor([0.25, 0.25, 0.5, 0.5]))
        torch.testing.assert_close(batch.targets.boxes[0, 1], torch.tensor([0.75, 0.75, 0.5, 0.5]))
        tokens = batch.text.token_ids[0]  # [CLS] red cup and a sauce ##r . [SEP]
        named = [tokens[row].tolist() for row in batch.targets.positive_map[0]]
        assert named[0] == list(TOKENIZER.encode("red cup").token_ids[1:-1])
        assert named[1] == named[2] == list(TOKENIZER.encode("a saucer").token_ids[1:-1])
        assert batch.text.valid.sum(dim=1).tolist() == [len(sample.caption.token_ids), 4]

    def test_a_flipped_sample_says_right_where_the_file_says_left(self, tmp_path: Path):
        line = grounding("Left cup and the dog", ([0, 0, 30, 20], [[0, 8]]), ([30, 20, 60, 40], [[17, 20]]))
        mirror = Augmentation((40,), 1333, crop_probability=0.0, flip_probability=1.0)
        sample = GroundingDataset([write_source(tmp_path, line)], mirror)[Draw(0, 0, 0)]
        assert sample.info.caption == "right cup and the dog. "
        words = [[sample.info.caption[start:end] for start, end in pieces] for pieces in sample.spans]
        assert words == [["right cup"], ["dog"]]
        assert sample.boxes.tolist() == [[30, 0, 60, 20], [0, 20, 30, 40]]

    def test_images_are_padded_with_zero_after_normalising(self):
        small, large = torch.full((3, 4, 6), 200, dtype=torch.uint8), torch.full((3, 5, 3), 10, dtype=torch.uint8)
        images = collate_images([small, large])
        assert images.pixels.shape == (2, 3, 5, 6) and images.padded
        assert not collate_images([small, small]).padded
        assert (images.pixels != 0).all(dim=1).equal(images.valid)
        assert images.valid.sum(dim=(1, 2)).tolist() == [24, 15]

    def test_detection_data_gets_labels_by_place_in_the_prompt(self, tmp_path: Path):
        instances = [
            {"bbox": [1, 1, 9, 9], "label": 7},
            {"bbox": [3, 3, 8, 8], "label": 2},
            {"bbox": [2, 2, 9, 9], "label": 7},
        ]
        line = {"filename": "a.png", "width": 60, "height": 40, "detection": {"instances": instances}}
        source = write_source(tmp_path, line, label_map={2: "cat", 7: "dog", 9: "red bus"})
        captions = set()
        for epoch in range(20):
            sample = GroundingDataset([source], SMALL)[Draw(0, epoch, 0)]
            names = sample.info.caption.rstrip(". ").split(". ")
            assert [names[label] for label in sample.labels] == ["dog", "cat", "dog"]
            words = [sample.info.caption[start:end] for ((start, end),) in sample.spans]
            assert words == ["dog", "cat", "dog"]
            captions.add(sample.info.caption)
        assert len(captions) > 3

    def test_objects_named_only_beyond_the_token_limit_are_left_out_and_noted(self, tmp_path: Path):
        caption = "cup " + "very " * 300 + "dog"
        line = grounding(caption, ([1, 1, 30, 30], [[0, 3]]), ([2, 2, 30, 30], [[len(caption) - 3, len(caption)]]))
        sample = GroundingDataset([write_source(tmp_path, line)], SMALL)[Draw(0, 0, 0)]
        assert sample.labels.tolist() == [0]
        assert "line 1: 1 objects left out, no token names them (305 tokens, 256 are read)" in sample.problems[0]
        batch = collate([sample])
        assert batch.text.token_ids.shape == (1, 256) and batch.text.token_ids[0, -1] == text.SEP_ID
        assert batch.targets.positive_map[0].nonzero().tolist() == [[0, 1]]

    def test_a_caption_of_special_tokens_only_still_makes_a_batch(self, tmp_path: Path):
        source = write_source(tmp_path, grounding("?.", ([1, 1, 30, 30], [[0, 1]])), grounding("", filename="b.png"))
        dataset = GroundingDataset([source], SMALL)
        batch = collate([dataset[Draw(n, 0, 0)] for n in range(2)])
        assert batch.text.token_ids.tolist() == [[101, 1029, 1012, 102], [101, 1012, 102, 0]]
        assert batch.targets.counts == (1, 0)
        assert batch.targets.positive_map[0, 0].tolist() == [False, True, False, False]

    def test_of_more_objects_than_queries_a_random_part_is_kept_and_noted(self, tmp_path: Path):
        boxes = [[n / 50, 1, 10 + n / 50, 20] for n in range(1000)]
        source = write_source(tmp_path, grounding("cups", (boxes, [[0, 4]])))
        dataset = GroundingDataset([source], SMALL, limits=SampleLimits(max_objects=900))
        first, second = dataset[Draw(0, 0, 0)], dataset[Draw(0, 1, 0)]
        assert len(first.boxes) == len(first.labels) == len(first.spans) == 900
        assert "1000 objects, 900 of them kept at random" in first.problems[0]
        assert not torch.equal(first.boxes / first.image.shape[2], second.boxes / second.image.shape[2])


class TestBadSamples:
    def faulty(self, folder: Path) -> TrainingSource:
        fine = [grounding("cup", ([1, 1, 30, 30], [[0, 3]]), filename=f"fine{n}.png") for n in range(2)]
        lines = [
            fine[0],
            grounding("cup", ([1, 1, 30, 30], [[0, 3]]), filename="gone.png"),
            grounding("cup", ([1, 1, 30, 30], [[0, 3]]), filename="broken.png"),
            grounding(
                "cup",
                (
                    [1, 1, 30, 30],
                    [[0, 3]],
                ),
                ([70, 1, 90, 30], [[0, 3]]),
                filename="outside.png",
            ),
            grounding("cup", ([1, 1, 30, 30], []), filename="nameless.png"),
            grounding("cup", ([1, 1, 30, 30], [[0, 3]]), filename="turned.png", size=(40, 60)),
            fine[1],
        ]
        source = write_source(folder, *lines)
        (folder / "gone.png").unlink()
        (folder / "broken.png").write_bytes((folder / "broken.png").read_bytes()[:500])
        return source

    MESSAGES = {
        1: "line 2: .*gone.png: no such file",
        2: "line 3: .*broken.png: not a readable image",
        3: r"line 4: object 2: box \[70, 1, 90, 30\] .* lies outside the 60x40 image",
        4: "line 5: a region names nothing",
        5: "line 6: .*turned.png is 60x40, annotated for 40x60",
    }

    @pytest.mark.parametrize("index", MESSAGES)
    def test_stop_names_file_and_line(self, tmp_path: Path, index: int):
        dataset = GroundingDataset([self.faulty(tmp_path)], SMALL)
        with pytest.raises(BadSampleError, match=rf"train.json: {self.MESSAGES[index]}"):
            dataset[Draw(index, 0, 0)]

    def test_skip_puts_the_next_good_sample_in_its_place_and_notes_what_was_skipped(self, tmp_path: Path):
        dataset = GroundingDataset([self.faulty(tmp_path)], SMALL, on_bad_sample="skip")
        sample = dataset[Draw(1, 0, 0)]
        assert sample.info.image_path.name == "outside.png" and len(sample.boxes) == 1
        assert [problem.split(": ")[1] for problem in sample.problems] == ["line 2", "line 3", "line 4"]
        assert dataset[Draw(4, 0, 0)].info.image_path.name == "fine1.png"
        assert torch.equal(dataset[Draw(5, 0, 0)].image, dataset[Draw(6, 0, 0)].image)
        assert collate([sample, dataset[Draw(0, 0, 0)]]).problems == sample.problems

    def test_skip_gives_up_where_every_sample_is_bad(self, tmp_path: Path):
        source = write_source(tmp_path, grounding("cup"), grounding("cup", filename="b.png"))
        for image in tmp_path.glob("*.png"):
            image.unlink()
        with pytest.raises(BadSampleError, match="2 bad samples in a row, the last one: .*line 1: .*a.png"):
            GroundingDataset([source], SMALL, on_bad_sample="skip")[Draw(1, 0, 0)]

    BAD_LINES = (
        '{"filename":"fine0.png","width":60,"height":40,"grounding":{"caption":"cup \\ud83d","regions":[]}}',
        '{"filename":7,"width":60,"height":40,"grounding":{"caption":"cup","regions":[]}}',
        '{"filename":"fine0.png","width":60,"height":40,"grounding":{"caption":null,"regions":[]}}',
        '{"filename":"fine0.png","width":Infinity,"height":40,"grounding":{"caption":"cup","regions":[]}}',
        '{"filename":"' + "x" * 300 + '","width":60,"height":40,"grounding":{"caption":"cup","regions":[]}}',
        "7",
        '{"filename"',
    )

    @pytest.mark.parametrize("line", BAD_LINES)
    def test_one_bad_line_is_skipped_and_noted(self, tmp_path: Path, line: str):
        source = write_source(tmp_path, grounding("cup", ([1, 1, 30, 30], [[0, 3]]), filename="fine0.png"))
        with source.annotations.path.open("a") as file:
            file.write(line + "\n")
        annotations = load_odvg(source.annotations.path)
        dataset = GroundingDataset([TrainingSource(annotations, tmp_path)], SMALL, on_bad_sample="skip")
        sample = dataset[Draw(1, 0, 0)]
        assert sample.info.image_path.name == "fine0.png" and "line 2" in sample.problems[0]
