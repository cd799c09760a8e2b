"""The runner asks every question once and hands the answers to `score` as a stream."""

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import tiny_model
from PIL import Image

from groundingdino.evaluation import EvaluationOptions, ImageAnswer, Question, evaluate, runner
from groundingdino.evaluation.annotation_file import ImageFile
from groundingdino.evaluation.answer_file import AnswerStore, read_answers
from groundingdino.inference.prompts import Categories, Referring
from groundingdino.runtime import distributed

OPTIONS = EvaluationOptions(scale=(48, 64), workers=0)


@dataclass(frozen=True)
class CountingProtocol:
    """Three categories on every image of a folder; the figure is what came in."""

    folder: Path

    def questions(self) -> tuple[Question, ...]:
        prompts = (Categories(["cat", "dog", "red cup"], names_per_caption=2),)
        return tuple(
            Question(ImageFile(path), prompts, (int(path.stem),)) for path in sorted(self.folder.glob("*.png"))
        )

    def score(self, answers: Iterator[ImageAnswer]) -> dict[int, tuple[int, tuple[int, ...], float]]:
        assert iter(answers) is answers  # a stream
        return {a.image_id: (len(a.scores), tuple(np.unique(a.labels)), float(a.scores[0])) for a in answers}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(5):
        pixels = generator.integers(0, 256, (40, 50 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
    return path


def test_every_image_is_asked_once_and_shared_captions_are_encoded_once(folder, monkeypatch):
    model = tiny_model()
    captions = []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda text: captions.append(len(text.token_ids)) or encode(text))
    begin = time.perf_counter()
    evaluation = evaluate(model, CountingProtocol(folder), OPTIONS, boxes_per_caption=20)
    assert captions == [2] and 0 < evaluation.seconds <= time.perf_counter() - begin
    assert (evaluation.images, evaluation.prompts) == (5, 5)
    assert {image_id: figure[0] for image_id, figure in evaluation.figures.items()} == dict.fromkeys(range(5), 2 * 20)


@dataclass(frozen=True)
class ManyCaptions(CountingProtocol):
    """Captions of which some come back with other images."""

    def questions(self) -> tuple[Question, ...]:
        captions = (("left", "red"), ("the dog",), ("left",), ("red", "left"))
        files = sorted(self.folder.glob("*.png"))
        return tuple(
            Question(ImageFile(path), tuple(map(Referring, asked)), tuple(range(2 * n, 2 * n + len(asked))))
            for n, (path, asked) in enumerate(zip(files, captions, strict=False))
        )


def test_a_caption_that_comes_back_with_another_image_is_not_encoded_again(folder, monkeypatch):
    model, captions = tiny_model(), []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda text: captions.append(len(text.token_ids)) or encode(text))
    assert len(evaluate(model, ManyCaptions(folder), OPTIONS).figures) == 6
    assert sum(captions) == 3


@dataclass(frozen=True)
class OneOfAnotherSize(CountingProtocol):
    """Three images, one of them annotated with another size."""

    def questions(self) -> tuple[Question, ...]:
        asked = super().questions()
        right, wrong = ImageFile(asked[0].image.path, (50, 40)), ImageFile(asked[1].image.path, (50, 40))
        return replace(asked[0], image=right), replace(asked[1], image=wrong, where="wanted by entry 8")


def test_an_image_of_another_size_than_annotated_is_an_error_that_names_both(folder):
    with pytest.raises(ValueError, match=r"^\S*1.png: 51x40 pixels, annotated as 50x40: .* fit, wanted by entry 8$"):
        evaluate(tiny_model(), OneOfAnotherSize(folder), OPTIONS)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(folder, tmp_path):
    expected = evaluate(tiny_model(), CountingProtocol(folder), OPTIONS).figures
    path, identity, asked = tmp_path / "answers", {"checkpoint": "tiny"}, []

    def stop_after_two(count: int) -> None:
        asked.append(count)
        if sum(asked) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(
            tiny_model(), CountingProtocol(folder), OPTIONS, store=AnswerStore(path, identity), progress=stop_after_two
        )
    part = path.with_name("answers.part0")
    part.write_bytes(part.read_bytes()[:-7])  # as a machine that fails may leave it
    asked.clear()
    evaluation = evaluate(
        tiny_model(),
        CountingProtocol(folder),
        OPTIONS,
        store=AnswerStore(path, identity, resume=True),
        progress=asked.append,
    )
    assert asked == [1, 1, 1, 1, 1] and evaluation.figures == expected
    assert [file.name for file in tmp_path.iterdir()] == ["answers"]
    header, again = read_answers(path)
    assert header == identity and CountingProtocol(folder).score(again) == expected


def test_a_model_that_answers_nan_is_an_error_that_names_it_and_no_perfect_score(folder):
    model = tiny_model()
    with torch.no_grad():
        model.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="^bad.safetensors gives boxes or scores that are not finite"):
        evaluate(model, CountingProtocol(folder), OPTIONS, name="bad.safetensors")


@pytest.mark.parametrize("world_size", [2])
def test_every_rank_gets_the_figures_of_one_process(folder, tmp_path, world_size):
    expected = evaluate(tiny_model(), CountingProtocol(folder), OPTIONS).figures
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=evaluate_as_rank, args=(rank, world_size, folder, tmp_path))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for rank in range(world_size):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=False) == expected


def evaluate_as_rank(rank: int, world_size: int, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    runner.ANSWERS_PER_MESSAGE = 1
    init = f"file://{out / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=world_size)
    torch.save(evaluate(tiny_model(), CountingProtocol(folder), OPTIONS).figures, out / f"{rank}.pt")
    distributed.shutdown()
