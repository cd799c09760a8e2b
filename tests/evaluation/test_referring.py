"""Referring evaluation: mmdet's figures, and one result however the work is grouped and shared."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import tiny_model
from PIL import Image

from groundingdino.data import ReferringExpression, load_expressions
from groundingdino.evaluation import (
    EvaluationOptions,
    ImageAnswer,
    ReferringProtocol,
    average_precision,
    evaluate_referring,
    precision,
)
from groundingdino.evaluation.metrics import iou_with
from groundingdino.evaluation.referring import report
from groundingdino.evaluation.runner import IMAGE_COST, shard
from groundingdino.inference.postprocess import category_scores, to_image_frame, top_detections
from groundingdino.inputs import noun_phrases, text
from groundingdino.inputs.images import collate_images, open_image, resize_for_inference
from groundingdino.runtime import distributed

GOLDEN = Path(__file__).parent.parent / "golden" / "data"
# Scores and boxes in pixels: sentences of different lengths in one batch sum in another order.
ATOL = 1e-5
BOX_ATOL = 2e-3
SCALE = (64, 96)


def ground_truth(count: int) -> list[ReferringExpression]:
    return [ReferringExpression(n, n + 1, "a.png", "cup", "refcoco", (10.0, 10, 30, 20)) for n in range(count)]


def answer(index: int, *ranked: tuple[list[float], float]) -> ImageAnswer:
    boxes = np.array([box for box, _ in ranked], dtype=np.float32).reshape(-1, 4)
    scores = np.array([score for _, score in ranked], dtype=np.float32)
    return ImageAnswer(index, boxes, scores, np.zeros(len(ranked), np.int64))


class TestFigures:
    def test_precision_is_mmdets_refexp_metric(self):
        expressions = load_expressions(GOLDEN / "mdetr_annotations" / "final_refexp_val.json")
        index = {expression.sample_id: n for n, expression in enumerate(expressions)}
        stored = json.loads((GOLDEN / "refexp.json").read_text())
        answers = [
            ImageAnswer(
                index[p["img_id"]], np.array(p["bboxes"]), np.array(p["scores"]), np.zeros(len(p["scores"]), int)
            )
            for p in stored["predictions"]
        ]
        figures = precision(expressions, answers)
        expected = stored["expected"]
        for name in ("refcoco", "refcoco+", "refcocog"):
            assert figures[name] == {k: expected[f"{name}_precision@{k}"] for k in (1, 5, 10)}
        mean = sum(sum(row.values()) for row in figures.values()) / 9
        assert mean == pytest.approx(expected["mean_precision"], abs=1e-15)

    def test_iou_of_touching_degenerate_and_inverted_boxes_is_zero(self):
        boxes = np.array([[30, 10, 40, 20], [15, 15, 15, 15], [25, 10, 15, 20], [10, 10, 30, 20], [10, 10, 20, 20]])
        assert iou_with(boxes, (10, 10, 30, 20)).tolist() == [0, 0, 0, 1, 0.5]

    def test_a_box_counts_from_an_iou_of_one_half_on(self):
        half = answer(0, ([10, 10, 20, 20], 0.9))
        below = answer(0, ([10, 10, 19.99, 20], 0.9))
        assert precision(ground_truth(1), [half])["refcoco"][1] == 1
        assert precision(ground_truth(1), [below])["refcoco"][1] == 0

    def test_an_expression_without_any_box_is_a_miss(self):
        assert precision(ground_truth(1), [answer(0)])["refcoco"] == {1: 0, 5: 0, 10: 0}

    def test_average_precision_of_perfect_half_and_no_answers(self):
        right, wrong = [10.0, 10, 30, 20], [50.0, 50, 60, 60]
        assert average_precision(ground_truth(2), [answer(0, (right, 0.9)), answer(1, (right, 0.1))]) == 1
        assert average_precision(ground_truth(1), [answer(0, (wrong, 0.9))]) == 0
        half = [answer(0, (right, 0.9)), answer(1, (wrong, 0.1))]
        assert average_precision(ground_truth(2), half) == pytest.approx(51 / 101)
        # IoU 0.75: a hit at six of the ten thresholds
        assert average_precision(ground_truth(1), [answer(0, ([10, 10, 25, 20], 1))]) == pytest.approx(0.6)

    def test_a_wrong_box_that_scores_higher_than_another_expressions_right_one_costs_precision(self):
        right, wrong = [10.0, 10, 30, 20], [50.0, 50, 60, 60]
        answers = [answer(0, (right, 0.9)), answer(1, (wrong, 0.8), (right, 0.7))]
        assert average_precision(ground_truth(2), answers) == pytest.approx((51 + 50 * 2 / 3) / 101)

    def test_average_precision_does_not_depend_on_how_it_is_cut_into_pieces(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ):
        generator = np.random.default_rng(0)
        answers = []
        for n in range(17):
            boxes = np.array([10, 10, 30, 20]) + generator.normal(0, 4, (6, 4))
            scores = -np.sort(-generator.random(6).astype(np.float32))
            answers.append(ImageAnswer(n, boxes.astype(np.float32), scores, np.zeros(6, int)))
        whole = average_precision(ground_truth(17), answers)
        monkeypatch.setattr("groundingdino.evaluation.coco.IMAGES_AT_ONCE", 4)
        assert average_precision(ground_truth(17), answers[::-1]) == whole
        assert 0.05 < whole < 0.9
        assert capsys.readouterr().out == ""


SENTENCES = [
    "the woman in orange",
    "dog",
    "man on the left of the blue car with a hat",
    "cup",
    "second zebra from the right",
    "red one",
    "the small cat that sleeps",
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[ReferringExpression], Path]:
    """Seven sentences about three images of different shapes, mixed up."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate([(90, 60), (50, 70), (64, 64)]):
        pixels = generator.integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{number}.png")
    of = [0, 1, 0, 2, 0, 1, 0]
    expressions = [
        ReferringExpression(100 + n, n + 1, f"{of[n]}.png", caption, "refcoco", (5.0, 5, 40, 45))
        for n, caption in enumerate(SENTENCES)
    ]
    return expressions, folder


OPTIONS = EvaluationOptions(scale=SCALE, workers=0)


def assert_same_answers(found: tuple[ImageAnswer, ...], expected: tuple[ImageAnswer, ...]) -> None:
    assert [a.image_id for a in found] == [a.image_id for a in expected]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=ATOL)
        # near ties may swap places: compare the boxes that are clear of their neighbours
        gaps = np.abs(np.diff(theirs.scores))
        clear = np.r_[True, gaps > 2 * ATOL] & np.r_[gaps > 2 * ATOL, True]
        assert clear.sum() > 5
        np.testing.assert_allclose(ours.boxes[clear], theirs.boxes[clear], atol=BOX_ATOL)


class TestEvaluator:
    def test_grouped_and_batched_sentences_answer_as_one_by_one(self, scenes: tuple[list[ReferringExpression], Path]):
        expressions, folder = scenes
        model = tiny_model()
        grouped = evaluate_referring(model, ReferringProtocol(expressions, folder), replace(OPTIONS, batch_size=3))
        assert grouped.images == 3
        tokenizer = text.default_tokenizer()
        one_by_one = []
        for index, expression in enumerate(expressions):
            resized = resize_for_inference(open_image(folder / expression.file_name), SCALE)
            words = text.collate_text([tokenizer.encode(expression.caption + ". ")])
            with torch.inference_mode():
                last = model(collate_images([resized.pixels]), words).layers[-1]
            scores = last.logits[0].max(dim=1).values.sigmoid()
            placed = to_image_frame(last.boxes[0], resized.geometry)
            boxes, best, _ = top_detections(scores, placed, 100)
            one_by_one.append(ImageAnswer(index, boxes.numpy(), best.numpy(), np.zeros(len(best), int)))
        assert_same_answers(grouped.figures.answers, tuple(one_by_one))
        assert grouped.figures.precision == precision(expressions, one_by_one)

    def test_the_image_half_runs_once_per_image(
        self, scenes: tuple[list[ReferringExpression], Path], monkeypatch: pytest.MonkeyPatch
    ):
        expressions, folder = scenes
        model = tiny_model()
        calls = []
        encode = model.encode_image
        monkeypatch.setattr(model, "encode_image", lambda images: calls.append(images) or encode(images))
        seen = []
        evaluate_referring(
            model, ReferringProtocol(expressions, folder), replace(OPTIONS, batch_size=2), progress=seen.append
        )
        assert len(calls) == 3 and seen == [4, 2, 1]

    def test_subject_scoring_counts_the_subjects_words_only(self, scenes: tuple[list[ReferringExpression], Path]):
        expressions, folder = scenes
        model = tiny_model()
        index = 2
        found = evaluate_referring(model, ReferringProtocol([expressions[index]], folder, "subject"), OPTIONS)
        best = evaluate_referring(model, ReferringProtocol([expressions[index]], folder), OPTIONS)
        assert report(found)["protocol"]["scoring"].endswith(f"part-of-speech tags by {noun_phrases.TAGGER}")
        assert np.abs(found.figures.answers[0].scores - best.figures.answers[0].scores).max() > 1e-3
        caption = expressions[index].caption
        encoded = text.default_tokenizer().encode(caption + ". ")
        tokens = noun_phrases.subject_tokens(caption, encoded)
        assert tokens == [1]  # man
        resized = resize_for_inference(open_image(folder / "0.png"), SCALE)
        with torch.inference_mode():
            last = model(collate_images([resized.pixels]), text.collate_text([encoded])).layers[-1]
        chosen = torch.zeros(1, len(encoded.token_ids), dtype=torch.bool)
        chosen[0, tokens] = True
        expected = category_scores(last.logits[0], chosen)[:, 0].sort(descending=True).values
        torch.testing.assert_close(torch.tensor(found.figures.answers[0].scores), expected[:100], atol=ATOL, rtol=0)

    def test_llmdets_scoring_is_named_in_the_report(self, scenes: tuple[list[ReferringExpression], Path]):
        expressions, folder = scenes
        evaluation = evaluate_referring(tiny_model(), ReferringProtocol(expressions, folder, "llmdet"), OPTIONS)
        scoring = report(evaluation)["protocol"]["scoring"]
        assert scoring.startswith("llmdet: LLMDet's") and "up to 0.7" in scoring and noun_phrases.TAGGER in scoring

    def test_the_report_is_plain_data_that_names_the_protocol(self, scenes: tuple[list[ReferringExpression], Path]):
        expressions, folder = scenes
        evaluation = evaluate_referring(tiny_model(), ReferringProtocol(expressions, folder), OPTIONS)
        again = json.loads(json.dumps(report(evaluation)))
        assert again["protocol"]["scoring"].startswith("max: best token")
        assert set(again["precision"]["refcoco"]) == {"1", "5", "10"}
        assert (again["prompts"], again["images"]) == (7, 3)

    def test_the_model_and_the_random_state_are_left_as_they_were(self, scenes: tuple[list[ReferringExpression], Path]):
        expressions, folder = scenes
        model = tiny_model().train()
        before = torch.get_rng_state()
        evaluate_referring(model, ReferringProtocol(expressions[:1], folder), OPTIONS)
        assert model.training and torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_missing_image_is_named_in_one_line(self, scenes: tuple[list[ReferringExpression], Path], workers: int):
        expressions, folder = scenes
        lost = [*expressions, replace(expressions[0], file_name="gone.png", number=8)]
        with pytest.raises(ValueError) as caught:
            evaluate_referring(tiny_model(), ReferringProtocol(lost, folder), replace(OPTIONS, workers=workers))
        wanted = "wanted by images entry 8 of the annotations"
        assert str(caught.value) == f"{folder / 'gone.png'}: no such file, {wanted}"

    def test_a_caption_longer_than_the_model_reads_is_cut_off(self, scenes: tuple[list[ReferringExpression], Path]):
        expressions, folder = scenes
        long = replace(expressions[0], caption="man " * 300)
        cut = replace(expressions[0], caption="man " * 254)
        protocol = ReferringProtocol([long, cut], folder)
        answers = evaluate_referring(tiny_model(), protocol, replace(OPTIONS, batch_size=1)).figures.answers
        assert np.isfinite(answers[0].scores).all()
        assert len(answers[0].boxes) == len(answers[1].boxes) > 50


class TestRanks:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 8])
    def test_every_image_has_one_rank_and_the_load_is_even(self, world_size: int):
        generator = np.random.default_rng(0)
        names = [f"{n}.png" for n, count in enumerate(generator.integers(1, 20, 60)) for _ in range(count)]
        expressions = [
            ReferringExpression(n, n + 1, name, "cup", "refcoco", (0, 0, 1, 1)) for n, name in enumerate(names)
        ]
        questions = ReferringProtocol(expressions, Path("images")).questions()
        shares = [shard(questions, rank, world_size) for rank in range(world_size)]
        indices = sorted(index for part in shares for question in part for index in question.ids)
        assert indices == list(range(len(expressions)))
        loads = [sum(IMAGE_COST + len(question.ids) for question in part) for part in shares]
        assert max(loads) - min(loads) <= 3

    def test_two_processes_give_the_result_of_one(self, scenes: tuple[list[ReferringExpression], Path], tmp_path: Path):
        expressions, folder = scenes
        alone = evaluate_referring(tiny_model(), ReferringProtocol(expressions, folder), OPTIONS)
        context = multiprocessing.get_context("spawn")
        arguments = (expressions, folder, tmp_path)
        processes = [context.Process(target=evaluate_as_rank, args=(rank, *arguments)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
        for rank in range(2):
            shared = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
            assert_same_answers(shared.figures.answers, alone.figures.answers)
            assert shared.figures.precision == alone.figures.precision
            assert shared.figures.average_precision == pytest.approx(alone.figures.average_precision, abs=1e-12)

    def test_more_processes_than_images_are_no_trouble(self):
        questions = ReferringProtocol(ground_truth(3), Path("images")).questions()
        assert [len(shard(questions, rank, 4)) for rank in range(4)] == [1, 0, 0, 0]


def evaluate_as_rank(rank: int, expressions: list[ReferringExpression], folder: Path, out: Path) -> None:
    """What a process of `test_two_processes_give_the_result_of_one` does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=2)
    evaluated = evaluate_referring(tiny_model(), ReferringProtocol(expressions, folder), OPTIONS)
    torch.save(evaluated, out / f"{rank}.pt")
    distributed.shutdown()
