"""Answers on disk: whole, resumed, cut off, of another evaluation."""

from pathlib import Path

import numpy as np
import pytest

from groundingdino.evaluation.answer_file import AnswerStore, read_answers
from groundingdino.evaluation.answers import ImageAnswer
from groundingdino.runtime import distributed


def answer(image_id: int, count: int = 3) -> ImageAnswer:
    generator = np.random.default_rng(image_id)
    scores = -np.sort(-generator.random(count, np.float32))
    return ImageAnswer(image_id, generator.random((count, 4), np.float32), scores, generator.integers(0, 1203, count))


def same(one: ImageAnswer, other: ImageAnswer) -> bool:
    return one.image_id == other.image_id and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("boxes", "scores", "labels")
    )


def fill(path: Path, image_ids: list[int], resume: bool = False, identity: dict[str, str] | None = None) -> AnswerStore:
    store = AnswerStore(path, identity or {"checkpoint": "a"}, resume)
    for image_id in image_ids:
        store.write([answer(image_id)])
    return store


def test_answers_come_back_as_they_were_written(tmp_path):
    with fill(tmp_path / "answers", [3, 1]) as store:
        store.write([answer(2, count=0)])
        assert store.answered() == {1, 2, 3}
        gathered = list(store.gathered())
    _, again = read_answers(tmp_path / "answers")
    for found in (gathered, list(again)):
        assert all(map(same, found, [answer(3), answer(1), answer(2, count=0)])) and len(found) == 3


def test_resumed_answers_are_kept_and_those_of_a_fresh_start_are_not(tmp_path):
    fill(tmp_path / "answers", [1, 2]).__exit__()
    with fill(tmp_path / "answers", [3], resume=True) as store:
        assert store.answered() == {1, 2, 3}
    with fill(tmp_path / "answers", [4]) as store:
        assert store.answered() == {4}


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_record_that_was_cut_off_is_written_over(tmp_path, cut):
    fill(tmp_path / "answers", [1, 2]).__exit__()
    part = tmp_path / "answers.part0"
    part.write_bytes(part.read_bytes()[:-cut])
    with AnswerStore(tmp_path / "answers", {"checkpoint": "a"}, resume=True) as store:
        assert store.answered() == {1}
        store.write([answer(3, count=0)])  # shorter than what was left
    with AnswerStore(tmp_path / "answers", {"checkpoint": "a"}, resume=True) as store:
        assert store.answered() == {1, 3}
        store.write([answer(2)])
        gathered = list(store.gathered())
    assert [one.image_id for one in gathered] == [1, 3, 2] and same(gathered[2], answer(2))


def test_parts_of_more_processes_than_there_are_now_count_too(tmp_path):
    fill(tmp_path / "answers", [1]).__exit__()
    (tmp_path / "answers.part0").rename(tmp_path / "answers.part3")
    with fill(tmp_path / "answers", [2], resume=True) as store:
        assert store.answered() == {1, 2}
        list(store.gathered())
    assert [file.name for file in tmp_path.iterdir()] == ["answers"]


def test_a_finished_evaluation_has_nothing_left_to_answer(tmp_path):
    with fill(tmp_path / "answers", [1, 2]) as store:
        list(store.gathered())
    with AnswerStore(tmp_path / "answers", {"checkpoint": "a"}, resume=True) as store:
        assert store.answered() == {1, 2}
        assert len(list(store.gathered())) == 2
    assert len(list(read_answers(tmp_path / "answers")[1])) == 2


def test_a_finished_evaluation_is_read_by_the_main_process_alone(tmp_path, monkeypatch):
    with fill(tmp_path / "answers", [1, 2]) as store:
        list(store.gathered())
    fakes = {"rank": lambda: 1, "world_size": lambda: 2, "barrier": lambda: None, "gather_objects": lambda own: [own]}
    for name, fake in fakes.items():
        monkeypatch.setattr(distributed, name, fake)
    with AnswerStore(tmp_path / "answers", {"checkpoint": "a"}, resume=True) as store:
        assert store.answered() == frozenset()  # else every answer would be sent once by each process


def test_an_image_answered_again_after_an_interruption_counts_once(tmp_path):
    with fill(tmp_path / "answers", [1, 2, 1]) as store:
        assert [one.image_id for one in store.gathered()] == [1, 2]


def test_answers_of_another_evaluation_are_refused(tmp_path):
    fill(tmp_path / "answers", [1]).__exit__()
    with pytest.raises(ValueError, match="holds answers with checkpoint 'a', not 'b': start without --resume"):
        fill(tmp_path / "answers", [], resume=True, identity={"checkpoint": "b"})


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\x00\xff" * 50])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "answers").write_bytes(content)
    with pytest.raises(ValueError, match="not a file of answers"):
        read_answers(tmp_path / "answers")
