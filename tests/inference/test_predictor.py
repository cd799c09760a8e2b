"""From any form of image and prompt to detections, on the golden tiny model."""

import copy
import os
import pickle
import random
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import image_batch, load_case, tiny_model
from PIL import Image

from groundingdino.checkpoints.model_file import SCALE_KEY, save_detector
from groundingdino.inference.engine import EncodedImage, RankedBoxes
from groundingdino.inference.predictor import DetectionFilter, Predictor, filter_detections, load_model
from groundingdino.inference.prompts import Categories, Phrases, Referring, Spans, resolve
from groundingdino.inputs.images import ImageGeometry, load_image, resize_for_inference
from groundingdino.inputs.text import default_tokenizer
from groundingdino.model import decoder
from groundingdino.structures import Detections

ROOT = Path(__file__).parents[2]
SCALE = (96, 160)  # keeps images small
GOLDEN_BOXES = 1e-2  # pixels; the golden file's boxes are of images up to 266 pixels wide
GOLDEN_SCORES = 1e-5
SAME = 1e-5  # other batch shapes, other order of sums
EVERYTHING = {"threshold": 0.0, "top_k": 1_000_000}


@pytest.fixture(scope="module")
def predictor():
    predictor = Predictor(tiny_model(), scale=SCALE)
    predictor.engine.pairs_per_pass = 4  # as on an accelerator, so that images and captions are padded to each other
    return predictor


@pytest.fixture(scope="module")
def photo():
    rng = np.random.default_rng(3)
    return Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8))


@pytest.fixture
def calls(predictor, monkeypatch):
    """How many rows went through the image half and the text half."""
    counts = {"images": 0, "captions": 0}
    encode_image, encode_text = predictor.model.encode_image, predictor.model.encode_text

    def counted_image(batch):
        counts["images"] += len(batch.pixels)
        return encode_image(batch)

    def counted_text(batch):
        counts["captions"] += len(batch.token_ids)
        return encode_text(batch)

    monkeypatch.setattr(predictor.model, "encode_image", counted_image)
    monkeypatch.setattr(predictor.model, "encode_text", counted_text)
    return counts


def assert_same(found, expected, tolerance=SAME):
    """Equal as sets of (label, box, score): near ties may swap places."""
    assert len(found.scores) == len(expected.scores)
    torch.testing.assert_close(found.scores, expected.scores, atol=tolerance, rtol=0)
    left, right = (torch.cat([d.labels[:, None].float(), d.boxes, d.scores[:, None]], 1) for d in (found, expected))
    distance = torch.cdist(left.double(), right.double(), p=float("inf"))
    if len(left):
        assert distance.min(dim=1).values.max() < 50 * tolerance
        assert distance.min(dim=0).values.max() < 50 * tolerance


# ---- golden values


def golden_images(name, model):
    case, tensors = load_case("infer", name)
    batch = image_batch(tensors["input"], case["image_sizes_hw"])
    with torch.inference_mode():
        tokens = model.encode_image(batch)
    geometries = [
        ImageGeometry(tuple(size), tuple(factor))
        for size, factor in zip(case["image_sizes_hw"], case["scale_factors_wh"], strict=True)
    ]
    return case, tensors, [EncodedImage(tokens, row, geometry) for row, geometry in enumerate(geometries)]


def golden_prompt(prompt):
    if prompt.get("custom_entities"):
        return Categories(prompt["text"].split(". "))
    if prompt["tokens_positive"] == -1:
        return Referring(prompt["text"])
    return Spans(prompt["text"], prompt["tokens_positive"])


@pytest.mark.parametrize(
    "name",
    ["rec_single", "categories_single", "spans_single", "categories_batch_padded", "rec_batch_mixed_captions"],
)
def test_every_mode_gives_mmdets_boxes_scores_labels_and_names(name, predictor):
    case, tensors, images = golden_images(name, predictor.model)
    prompts = [golden_prompt(prompt) for prompt in case["prompts"]]
    found = predictor.predict(images, prompts, threshold=0.0, top_k=30)
    for i, detections in enumerate(found):
        torch.testing.assert_close(detections.scores, tensors[f"result.{i}.scores"], atol=GOLDEN_SCORES, rtol=0)
        torch.testing.assert_close(detections.boxes, tensors[f"result.{i}.boxes"], atol=GOLDEN_BOXES, rtol=0)
        assert detections.labels.tolist() == tensors[f"result.{i}.labels"].tolist()
        theirs = [text.removesuffix(". ") for text in case["label_names"][i]]
        assert list(detections.names) == theirs


# ---- image forms


def test_a_path_an_image_an_array_and_a_tensor_give_the_same(predictor, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    array = np.array(photo)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms = [tmp_path / "photo.png", str(tmp_path / "photo.png"), photo, array, tensor, tensor / 255]
    expected = predictor.predict(photo, categories=["cat", "dog"], **EVERYTHING)
    assert isinstance(expected, Detections) and len(expected.scores) == 120
    for form in forms:
        found = predictor.predict(form, categories=["cat", "dog"], **EVERYTHING)
        assert torch.equal(found.boxes, expected.boxes) and torch.equal(found.scores, expected.scores)


def test_a_folder_a_list_and_a_batch_give_one_result_an_image_in_order(predictor, photo, tmp_path):
    mirrored = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    photo.save(tmp_path / "b.png")
    mirrored.save(tmp_path / "a.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    expected = [predictor.predict(image, referring="the cat") for image in (mirrored, photo)]
    batch = np.stack([np.array(mirrored), np.array(photo)])
    for images in (tmp_path, [mirrored, photo], batch, torch.from_numpy(batch).permute(0, 3, 1, 2)):
        found = predictor.predict(images, referring="the cat")
        assert isinstance(found, list)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.boxes, other.boxes)


def test_exif_orientation_is_applied_to_files_and_images(predictor, photo, tmp_path):
    turned = photo.transpose(Image.Transpose.ROTATE_90)  # stored on its side, tag 6 says: turn it back
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    expected = predictor.predict(photo, categories=["cat"], **EVERYTHING)
    with Image.open(tmp_path / "turned.png") as opened:
        for form in (tmp_path / "turned.png", opened):
            found = predictor.predict(form, categories=["cat"], **EVERYTHING)
            assert torch.equal(found.boxes, expected.boxes)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://example.org/cat.jpg", "addresses are not fetched"),
        ("missing.jpg", "missing.jpg: no such file"),
        (np.zeros((4, 5, 3), np.float32), "uint8 in 0..255, got float32"),
        (np.zeros((4, 5, 2), np.uint8), r"\(H, W, 3\) RGB, got \(4, 5, 2\)"),
        (torch.zeros(5, 4, 3), r"\(3, H, W\) RGB, got \(5, 4, 3\)"),
        (torch.full((3, 4, 5), -2.0), "do not normalize it before"),
        (torch.zeros(3, 4, 5, dtype=torch.int32), "got torch.int32"),
        (7, "got int"),
    ],
)
def test_what_is_no_image_is_refused_with_what_to_give(predictor, image, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(image, categories=["cat"])


def test_an_empty_folder_is_refused(predictor, tmp_path):
    with pytest.raises(ValueError, match="no image in this folder"):
        predictor.predict(tmp_path, categories=["cat"])


# ---- prompts


def test_the_string_form_is_the_list_of_its_names(predictor, photo):
    string = predictor.predict(photo, categories="cat . remote control .", **EVERYTHING)
    listed = predictor.predict(photo, categories=["cat", "remote control"], **EVERYTHING)
    assert torch.equal(string.scores, listed.scores) and string.names == listed.names


def test_equal_names_stay_apart_by_label_and_keep_what_the_user_wrote(predictor, photo):
    names = ["bow (weapon)", "bow (decorative ribbons)", "bow (weapon)"]
    found = predictor.predict(photo, categories=names, **EVERYTHING)
    assert len(found.scores) == 180 and set(found.labels.tolist()) == {0, 1, 2}
    assert all(name == names[label] for name, label in zip(found.names, found.labels.tolist(), strict=True))


def test_phrases_carry_their_spans_and_equal_phrases_stay_apart(predictor, photo):
    caption = "a dog next to a dog and a cat"
    found = predictor.predict(photo, Phrases(caption), **EVERYTHING)
    assert set(found.labels.tolist()) == {0, 1, 2}
    spans = {0: (0, 5), 1: (14, 19), 2: (24, 29)}
    for label, name, (span,) in zip(found.labels.tolist(), found.names, found.spans, strict=True):
        assert span == spans[label] and name == caption[slice(*span)]


def test_spans_name_their_pieces(predictor, photo):
    prompt = ("a small dog next to a wooden bench", [[(0, 11)], [(2, 7), (27, 34)]])
    found = predictor.predict(photo, spans=prompt, **EVERYTHING)
    assert set(found.names) == {"a small dog", "small / n bench"}
    assert found.spans[found.labels.tolist().index(1)] == ((2, 7), (27, 34))


def test_referring_gives_one_box_and_the_sentence_as_its_name(predictor, photo):
    found = predictor.predict(photo, referring="the man on the left")
    assert found.boxes.shape == (1, 4) and found.names == ("the man on the left",) and found.labels.tolist() == [0]
    assert found.spans is None


def test_llmdet_scoring_ranks_the_thirty_best_boxes_anew_by_the_named_sides(predictor, photo):
    """Equal to LLMDet's published rule, written out here for an image of 120 x 90 pixels."""
    sentence = "the dog on the upper right"
    by_phrase = predictor.predict(photo, spans=(sentence, [[(0, 7)]]), **EVERYTHING)
    found = predictor.predict(photo, referring=sentence, scoring="llmdet", **EVERYTHING)
    boxes, scores = by_phrase.boxes[:30], by_phrase.scores[:30]
    x, y = (boxes[:, 0] + boxes[:, 2]) / 240, (boxes[:, 1] + boxes[:, 3]) / 180
    expected = scores + 0.7 * x + 0.7 * (1 - y)
    order = expected.argsort(descending=True)
    torch.testing.assert_close(found.scores, expected[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.boxes, boxes[order], atol=1e-3, rtol=0)
    assert len(found.scores) == 30 and not torch.equal(order, torch.arange(30))
    assert set(found.names) == {sentence}


def test_llmdet_scoring_without_a_side_is_its_phrase_alone(predictor, photo):
    by_phrase = predictor.predict(photo, spans=("the dog near a man", [[(0, 7)]]), **EVERYTHING)
    found = predictor.predict(photo, referring="the dog near a man", scoring="llmdet", **EVERYTHING)
    assert torch.equal(found.scores, by_phrase.scores) and torch.equal(found.boxes, by_phrase.boxes)
    one = predictor.predict(photo, referring="man beside a woman", scoring="llmdet")
    assert one.names == ("man beside a woman",)  # two occurrences, one box


def test_subject_scoring_is_the_mean_over_the_subjects_tokens(predictor, photo):
    sentence = "the hand-held umbrella left of the man"
    by_span = predictor.predict(photo, spans=(sentence, [[(0, 22)]]), **EVERYTHING)
    by_subject = predictor.predict(photo, referring=sentence, scoring="subject", **EVERYTHING)
    by_maximum = predictor.predict(photo, referring=sentence, **EVERYTHING)
    assert torch.equal(by_subject.scores, by_span.scores) and torch.equal(by_subject.boxes, by_span.boxes)
    assert not torch.allclose(by_subject.scores, by_maximum.scores, atol=1e-3)
    assert (by_maximum.scores >= by_subject.scores).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got 0"),
        ({"categories": ["cat"], "referring": "a cat"}, "got 2"),
        ({"categories": []}, "no categories"),
        ({"categories": ["cat", "x " * 254]}, "is 254 tokens long"),
        ({"referring": " . "}, "caption is empty"),
        ({"referring": "cat " * 300}, "303 tokens long, the model reads 256"),
        ({"referring": "a cat", "scoring": "mean"}, "unknown scoring 'mean'"),
        ({"phrases": "running"}, "no noun phrase"),
        ({"spans": ("a cat", [])}, "no spans"),
        ({"spans": ("a cat", [[(2, 9)]])}, r"span \[2, 9\) is not inside 'a cat'"),
        ({"spans": ("a cat", [[(1, 2)], [(2, 5)]])}, "hold no word"),
        ({"categories": ["cat"], "threshold": 30}, "threshold 30 is not in"),
        ({"categories": ["cat"], "nms": 2}, "nms 2 is an IoU"),
        ({"categories": ["cat"], "top_k": 0}, "top_k 0"),
        ({"categories": ["cat"], "batch_size": 0}, "batch_size 0"),
        ({"prompts": "cat"}, "got 'cat'"),
        ({"prompts": [Referring("a cat")] * 2}, "2 prompts for 1 images"),
        ({"prompts": Referring("a cat"), "categories": ["cat"]}, "not both"),
    ],
)
def test_prompts_and_options_that_cannot_be_meant_are_refused(predictor, photo, options, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(photo, **options)


def test_fewer_prompts_than_images_are_refused(predictor, photo):
    with pytest.raises(ValueError, match="1 prompts for more images"):
        predictor.predict([photo, photo], [Referring("a cat")])


# ---- any number of categories


def test_1203_categories_equal_the_concatenation_of_their_chunks(predictor, photo, calls):
    words = ["red", "wooden", "small", "cat", "chair", "umbrella", "zebra", "remote", "bottle", "skateboard"]
    names = [f"{random.Random(i).choice(words)} {words[i % 10]} thing_{i}" for i in range(1203)]
    prompt = predictor.encode_prompt(Categories(names))
    chunks = prompt.resolved.chunks
    assert len(chunks) > 20 and calls["captions"] == len(chunks)
    assert max(len(chunk.caption.token_ids) for chunk in chunks) <= 256
    encoded = predictor.encode_image(photo)
    whole = predictor.predict(encoded, prompt, **EVERYTHING)
    assert torch.isfinite(whole.scores).all() and torch.isfinite(whole.boxes).all()
    assert len(whole.scores) > 300 * len(chunks) and whole.labels.max() > 1190
    starts = [chunk.first_label for chunk in chunks] + [len(names)]
    alone = [
        predictor.predict(encoded, categories=names[start:end], **EVERYTHING)
        for start, end in zip(starts[:3], starts[1:4], strict=True)
    ]
    for start, end, part in zip(starts[:3], starts[1:4], alone, strict=True):
        own = (whole.labels >= start) & (whole.labels < end)
        part = Detections(part.boxes, part.scores, part.labels + start, part.names)
        chosen = Detections(whole.boxes[own], whole.scores[own], whole.labels[own], ())
        assert_same(chosen, part)
    assert calls["images"] == 1


# ---- what is computed once


def test_several_prompts_compute_the_image_half_once(predictor, photo, calls):
    prompts = [Referring("a cat"), Categories(["cat", "dog"]), Referring("a dog"), Referring("a cat")]
    (found,) = predictor.predict_each([photo], prompts, **EVERYTHING)
    assert calls == {"images": 1, "captions": 3}
    for prompt, detections in zip(prompts, found, strict=True):
        assert_same(detections, predictor.predict(photo, prompt, **EVERYTHING))


def test_several_images_compute_the_text_half_once(predictor, photo, calls):
    images = [photo, photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), photo.resize((70, 130))]
    found = predictor.predict(images, categories=["cat", "dog"], **EVERYTHING)
    assert calls == {"images": 3, "captions": 1}
    for image, detections in zip(images, found, strict=True):
        assert_same(detections, predictor.predict(image, categories=["cat", "dog"], **EVERYTHING))


def test_encoded_halves_are_not_computed_again(predictor, photo, calls):
    image, prompt = predictor.encode_image(photo), predictor.encode_prompt(Categories(["cat"]))
    expected = predictor.predict(photo, categories=["cat"], **EVERYTHING)
    calls.update(images=0, captions=0)
    assert_same(predictor.predict(image, prompt, **EVERYTHING), expected)
    first, second = predictor.predict([image, photo], [prompt, Referring("a dog")], **EVERYTHING)
    assert calls == {"images": 1, "captions": 1}
    assert_same(first, expected)
    assert set(second.names) == {"a dog"}


def test_images_are_opened_only_when_they_are_needed(predictor, photo):
    opened = []

    def images():
        for name in "abc":
            opened.append(name)
            yield photo

    stream = predictor.stream(images(), Referring("a cat"))
    next(stream)
    assert opened == ["a", "b"]  # one ahead, to know where a batch ends
    assert len(list(stream)) == 2


def test_results_are_the_callers_to_edit(predictor, photo):
    found = predictor.predict(photo, categories=["cat"], **EVERYTHING)
    before = found.boxes.clone()
    found.boxes.mul_(2)
    assert torch.equal(found.boxes, before * 2) and not found.boxes.requires_grad


def test_nothing_is_fetched_from_anywhere(photo, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("tried to open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    predictor = Predictor(tiny_model(), scale=SCALE)
    prompts = [Categories(["cat"]), Phrases("a man with a dog"), Referring("the man", "subject")]
    assert len(predictor.predict_each(photo, prompts, **EVERYTHING)[0]) == 3


# ---- which detections are kept


def test_threshold_and_top_k_cut_the_ranked_list(predictor, photo):
    everything = predictor.predict(photo, categories=["cat", "dog"], **EVERYTHING)
    cut = everything.scores[20].item()
    found = predictor.predict(photo, categories=["cat", "dog"], threshold=cut)
    assert torch.equal(found.scores, everything.scores[everything.scores >= cut])
    assert torch.equal(predictor.predict(photo, categories=["cat", "dog"], threshold=0.0, top_k=7).scores,
                       everything.scores[:7])  # fmt: skip
    nothing = predictor.predict(photo, categories=["cat", "dog"], threshold=1.0)
    assert nothing.boxes.shape == (0, 4) and nothing.names == () and nothing.labels.dtype == torch.int64


def test_a_score_of_three_tenths_is_kept_by_default_and_a_lower_one_is_not():
    scores = torch.tensor([0.9, 0.3, 0.29, 0.1])
    ranked = RankedBoxes(torch.zeros(4, 4), scores, torch.zeros(4, dtype=torch.int64))
    prompt = resolve(Categories(["cat"]), default_tokenizer())
    assert filter_detections(ranked, prompt, DetectionFilter()).scores.tolist() == scores[:2].tolist()


def test_nms_removes_overlaps_within_a_label_or_among_all(predictor, photo):
    from torchvision.ops import box_iou

    options = {"categories": ["cat", "dog"], **EVERYTHING}
    plain = predictor.predict(photo, **options)
    by_label = predictor.predict(photo, nms=0.02, **options)
    among_all = predictor.predict(photo, nms=0.02, nms_per_label=False, **options)
    assert len(among_all.scores) < len(by_label.scores) < len(plain.scores)
    overlap = box_iou(by_label.boxes, by_label.boxes).fill_diagonal_(0)
    same = by_label.labels[:, None] == by_label.labels[None]
    assert overlap[same].max() <= 0.02 < overlap[~same].max()
    assert box_iou(among_all.boxes, among_all.boxes).fill_diagonal_(0).max() <= 0.02
    assert by_label.scores[0] == plain.scores[0] and (by_label.scores.diff() <= 0).all()


def test_predict_each_suppresses_within_a_label_or_among_all_as_predict_does(predictor, photo):
    prompt = Categories(["cat", "dog"])
    for per_label in (True, False):
        options = {**EVERYTHING, "nms": 0.02, "nms_per_label": per_label}
        ((found,),) = predictor.predict_each(photo, [prompt], **options)
        assert torch.equal(found.scores, predictor.predict(photo, prompt, **options).scores)


# ---- precisions


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("bf16", 0.02), ("fp16", 2e-3), ("bf16-mixed", 0.03), ("fp16-mixed", 1e-3)]
)
def test_every_precision_gives_finite_and_near_results_without_a_warning(photo, precision, tolerance, recwarn):
    low = Predictor(tiny_model(), precision=precision, scale=SCALE)
    exact = Predictor(tiny_model(), scale=SCALE)
    for options in ({"categories": ["cat", "dog"]}, {"referring": "the cat on the left"}):
        found = low.predict(photo, threshold=0.0, top_k=20, **options)
        expected = exact.predict(photo, threshold=0.0, top_k=20, **options)
        assert found.boxes.dtype == found.scores.dtype == torch.float32
        assert torch.isfinite(found.boxes).all()
        near = (found.scores - expected.scores).abs() <= tolerance
        assert near.float().mean() >= 0.75  # near ties among the proposals choose a few other queries
    assert not recwarn.list


def test_a_precision_that_is_no_slower_than_another_is_not_warned_of(caplog):
    Predictor(tiny_model(), precision="fp32")
    assert not caplog.messages


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="unknown precision 'int8'"):
        Predictor(tiny_model(), precision="int8")


# ---- loading


def test_a_checkpoint_says_the_size_of_its_images_and_the_caller_may_differ(tmp_path):
    save_detector(tmp_path / "plain.safetensors", tiny_model())
    save_detector(tmp_path / "small.safetensors", tiny_model(), {SCALE_KEY: "[112, 200]"})
    assert load_model(tmp_path / "plain.safetensors", "cpu").scale == (800, 1333)
    assert load_model(tmp_path / "small.safetensors", "cpu").scale == (112, 200)
    assert load_model(tmp_path / "small.safetensors", "cpu", scale=(64, 96)).scale == (64, 96)


# ---- batch invariance


def random_words(rng):
    words = "man woman dog red left on the table with a small umbrella second zebra ? from right of".split()
    return " ".join(rng.choice(words) for _ in range(rng.randint(1, 12))) + " cat"


@pytest.mark.parametrize("seed", range(4))
def test_results_do_not_depend_on_the_captions_of_neighbours(predictor, seed):
    rng, pixels = random.Random(seed), np.random.default_rng(seed)
    images = [pixels.integers(0, 255, (64, 80, 3), dtype=np.uint8) for _ in range(3)]
    prompt = Referring(random_words(rng))
    alone = predictor.predict(images[0], prompt, **EVERYTHING)
    for _ in range(3):
        neighbours = [Referring(random_words(rng)), Categories([random_words(rng) for _ in range(rng.randint(1, 20))])]
        place = rng.randrange(3)
        prompts = neighbours[:place] + [prompt] + neighbours[place:]
        batch = images[1 : place + 1] + [images[0]] + images[place + 1 :]
        found = predictor.predict(batch, prompts, batch_size=3, **EVERYTHING)
        assert_same(found[place], alone)


def test_padding_reaches_an_image_through_backbone_windows_and_query_positions_only(monkeypatch):
    """Both ways are mmdet's: windows reach into the padding, and a query's position is relative to the padded map.

    With the backbone's features of the lone image in place, constant query positions and noise in the padding,
    nothing differs.
    """
    monkeypatch.setattr(decoder, "box_encoding", lambda boxes, width: boxes.new_ones(*boxes.shape[:-1], 4 * width))
    predictor = Predictor(tiny_model(), scale=(128, 256))
    pixels = np.random.default_rng(0)
    image = pixels.integers(0, 255, (128, 192, 3), dtype=np.uint8)  # multiples of the last stride
    taller = pixels.integers(0, 255, (256, 128, 3), dtype=np.uint8)
    alone = predictor.encode_image(image)
    resized = [resize_for_inference(load_image(x), predictor.scale) for x in (image, taller)]
    padded = predictor.engine.encode_images(resized)[0]
    real = padded.tokens.valid[0]
    assert real.sum() == alone.tokens.tokens.shape[1] < len(real)
    tokens = torch.randn_like(padded.tokens.tokens)
    tokens[0, real] = alone.tokens.tokens[0]
    mended = EncodedImage(replace(padded.tokens, tokens=tokens), 0, padded.geometry)
    expected = predictor.predict(alone, categories=["cat", "dog"], **EVERYTHING)
    assert_same(predictor.predict(mended, categories=["cat", "dog"], **EVERYTHING), expected)
    through_backbone = (padded.tokens.tokens[0, real] - alone.tokens.tokens[0]).abs().max()
    assert through_backbone > 1e-3  # mmdet's windows do reach into the padding


def test_resolving_needs_no_model():
    resolved = resolve(Categories(["cat", "dog"]), default_tokenizer())
    assert resolved.names == ("cat", "dog") and len(resolved.chunks) == 1
    with pytest.raises(ValueError, match="got str"):
        resolve("cat", default_tokenizer())


# ---- any argument of any type


class Anything:
    """No image, no prompt, no number."""


ENDLESS: list = []
ENDLESS.append(ENDLESS)
NUMBERS = [True, 7, -1, 2**70, 0.5, float("nan"), float("inf"), 1j, np.float32(2), torch.tensor(float("nan"))]
TEXTS = [b"cat", bytearray(b"x"), "", "\0", "\ud83d", "x" * 300_000, "a\nb"]
LISTS = [[], [[]], ENDLESS, {}, {"a": 1}, {1}, (), (1,), ("a", "b", "c"), [None], [1.5], ["cat", None], ["\udc00"]]
SPANS = [("a cat", [[(0, "x")]]), ("a cat", 5), ("a cat", [[(0,)]]), ("a cat", [])]
ARRAYS = [np.zeros(3), np.array("x"), torch.zeros(0), torch.zeros(2, 3), torch.zeros(3, 4, 4, device="meta")]
PROMPTS = [
    *(Categories(None), Categories([1]), Categories(["cat"], names_per_caption="x"), Spans(None, None)),
    *(Spans("a cat", [[5]]), Referring(3), Referring("a cat", None), Referring("a cat", []), Phrases(b"x")),
]
OTHERS = [None, range(3), object(), Anything, Anything(), len]
VALUES = [*NUMBERS, *TEXTS, *LISTS, *SPANS, *ARRAYS, *PROMPTS, *OTHERS]


@pytest.mark.parametrize(
    "name", "images prompts categories phrases spans referring threshold top_k nms batch_size scoring".split()
)
def test_an_argument_of_any_type_gives_an_answer_or_one_sentence(predictor, photo, name):
    for value in VALUES:
        arguments = {"images": photo, name: value}
        if name not in ("prompts", "categories", "phrases", "spans", "referring"):
            arguments["referring"] = "a cat"
        try:
            predictor.predict(**arguments)
        except (ValueError, TypeError) as error:
            assert "\n" not in str(error) and 10 < len(str(error)) < 500, (value, error)


def test_prompts_of_any_type_are_refused_by_predict_each(predictor, photo):
    for value in VALUES:
        try:
            predictor.predict_each(photo, value)
        except (ValueError, TypeError) as error:
            assert "\n" not in str(error) and 10 < len(str(error)) < 500, (value, error)


def test_wrong_prompts_are_refused_before_an_image_is_opened(predictor):
    def images():
        raise AssertionError("opened")
        yield

    with pytest.raises(ValueError, match="got 5"):
        predictor.predict(images(), [Referring("a cat"), 5])


# ---- threads and copies


def test_eight_threads_get_what_one_gets(predictor, photo):
    prompts = [Referring(f"the {word} one") for word in "red blue green small large left right near".split()]
    expected = [predictor.predict(photo, prompt, **EVERYTHING) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            found = list(pool.map(lambda prompt: predictor.predict(photo, prompt, **EVERYTHING), prompts))
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one.boxes, other.boxes) and torch.equal(one.scores, other.scores)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda predictor: pickle.loads(pickle.dumps(predictor))])
def test_a_copied_or_pickled_predictor_gives_the_same(photo, copy_of):
    original = Predictor(tiny_model(), scale=SCALE)
    expected = original.predict(photo, referring="a cat", **EVERYTHING)
    found = copy_of(original).predict(photo, referring="a cat", **EVERYTHING)
    assert torch.equal(found.boxes, expected.boxes) and torch.equal(found.scores, expected.scores)


FORKED = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
import numpy, torch
from golden_cases import tiny_model
from groundingdino.inference.predictor import Predictor

PHOTO = numpy.full((60, 90, 3), 90, numpy.uint8)

def answer(predictor):
    return predictor.predict(PHOTO, referring="a cat").boxes.tolist()

def answer_of_mine():
    return answer(predictor)

if __name__ == "__main__":
    torch.set_num_threads(2)
    predictor = Predictor(tiny_model(), scale=(96, 160))
    expected = answer(predictor)
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        found = [pool.submit(answer_of_mine).result(timeout=120) for _ in range(2)]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found.append(pool.submit(answer, predictor).result(timeout=120))
    assert numpy.allclose(found, [expected] * 3, atol=1e-3), (found, expected)
    print("the same")
"""


@pytest.mark.slow
def test_a_predictor_answers_in_forked_and_in_spawned_processes(tmp_path):
    (tmp_path / "forked.py").write_text(FORKED)
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    command = [sys.executable, tmp_path / "forked.py"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300)
    assert done.stdout == "the same\n", done.stderr[-3000:]


def test_weights_that_give_nan_are_an_error_that_names_the_checkpoint(photo, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="broken.safetensors gives boxes or scores that are not finite"):
        Predictor(model, scale=SCALE, name="broken.safetensors").predict(photo, referring="a cat")
