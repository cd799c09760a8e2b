"""Options of labelling, and which stored boxes become labels; the rest is tested in tests/cli/test_label.py."""

import time

import numpy as np
import pytest
from golden_cases import tiny_model
from label_runs import write_images

from groundingdino.inference.image_source import list_images
from groundingdino.inference.label_store import Claim, LabelRun, Record
from groundingdino.inference.labelling import Choice, Chooser, LabelOptions, label
from groundingdino.inference.predictor import Predictor
from groundingdino.inference.vocabulary import plain_names


def test_the_ends_of_each_range_are_taken_and_what_is_beyond_is_refused():
    LabelOptions(batch_size=1, keep_above=0.0)
    Choice(threshold=0.0, nms=1.0, min_size=0.0, top_k=1)
    for wrong in ({"batch_size": 0}, {"keep_above": 1.0}, {"keep_above": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LabelOptions(**wrong)
    with pytest.raises(ValueError, match=r"min_size -0\.5"):
        Choice(min_size=-0.5)


def record(*found: tuple[list[float], float, int]) -> Record:
    """Stored boxes with their scores and texts, best first."""
    boxes, scores, labels = zip(*found, strict=True)
    columns = (boxes, "<f4"), (scores, "<f4"), (labels, "<i4")
    return Record(0, 100, 100, *(np.array(values, form).tobytes() for values, form in columns))


BOX, NEAR, FAR, THIN = [10, 10, 50, 50], [12, 10, 50, 50], [60, 60, 90, 90], [5, 5, 8, 95]
FOUND = record((BOX, 0.9, 0), (NEAR, 0.8, 1), (NEAR, 0.7, 0), (FAR, 0.6, 1), (THIN, 0.5, 0))


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (Choice(nms=None), [0.9, 0.8, 0.7, 0.6, 0.5]),
        (Choice(nms=0.7), [0.9, 0.8, 0.6, 0.5]),  # the worse of two boxes of one name goes
        (Choice(nms=None, nms_across=0.7), [0.9, 0.6, 0.5]),  # of any names
        (Choice(nms=None, min_size=4), [0.9, 0.8, 0.7, 0.6]),  # three pixels wide are too few
        (Choice(nms=None, top_k=2), [0.9, 0.8]),
        (Choice(threshold=0.65, nms=None), [0.9, 0.8, 0.7]),
        (Choice(nms=0.7, nms_across=0.7, min_size=4, top_k=1), [0.9]),
    ],
)
def test_labels_are_chosen_by_suppression_within_and_across_names_size_number_and_score(choice, expected):
    found = Chooser(("cat", "dog"), plain_names(["cat", "dog"]), choice)(FOUND)
    assert found.scores.tolist() == pytest.approx(expected)
    of_score = {0.9: "cat", 0.8: "dog", 0.7: "cat", 0.6: "dog", 0.5: "cat"}
    assert list(found.names) == [of_score[score] for score in expected]


def test_suppression_across_names_comes_before_the_number_of_boxes():
    vocabulary = plain_names(["dog", "cat"])  # in another order than was asked for
    found = Chooser(("cat", "dog"), vocabulary, Choice(nms_across=0.7, top_k=2))(FOUND)
    assert list(found.names) == ["cat", "dog"] and found.labels.tolist() == [1, 0]
    assert found.boxes.tolist() == [BOX, FAR]


def test_a_shard_is_done_only_when_its_last_record_is_written_however_slow_the_disk(tmp_path, monkeypatch):
    append = Claim.append
    monkeypatch.setattr(Claim, "append", lambda claim, record: (time.sleep(0.2), append(claim, record)))
    predictor = Predictor(tiny_model(), scale=(48, 64))
    run = LabelRun.create(tmp_path / "run", {}, lambda: list_images([write_images(tmp_path / "photos", 2)]))
    label(predictor, run, predictor.encode_prompt(plain_names(["cat"])), LabelOptions(workers=0))
    assert run.is_done(0) and [record.position for _, record in run.results()] == [0, 1]
