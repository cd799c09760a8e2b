"""What is drawn of a protocol's answers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from protocol_data import photograph

from groundingdino.evaluation.answer_file import AnswerStore
from groundingdino.evaluation.answers import ImageAnswer
from groundingdino.evaluation.detection_misses import as_detections, save_detection_misses


def test_each_drawn_box_bears_the_name_of_its_label():
    boxes = np.array([[0, 0, 10, 10], [5, 5, 20, 20], [1, 1, 4, 4]])
    drawn = as_detections(boxes, np.array([0.9, 0.5, 0.4]), np.array([2, 0, 2]), ("cat", "dog", "bird"))
    assert drawn.names == ("bird", "cat", "bird") and drawn.labels.tolist() == [2, 0, 2]
    assert drawn.boxes.tolist() == boxes.tolist()
    nothing = as_detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), ("cat",))
    assert nothing.names == () and nothing.boxes.shape == (0, 4)


@dataclass(frozen=True)
class OneCat:
    """Every image is the same photograph of a cat."""

    file: Path

    def picture(self, image_id):
        return self.file, np.array([[5.0, 5, 25, 25]]), np.zeros(1, int), ("cat", "dog")


def test_an_object_is_missed_unless_a_box_of_its_label_lies_there_that_is_sure_enough(tmp_path):
    photograph(tmp_path / "cat.png", 0)
    there, elsewhere = [[5.0, 5, 25, 25]], [[30.0, 20, 50, 40]]
    with AnswerStore(tmp_path / "answers") as store:
        for number, (found, score, label) in enumerate(
            [(there, 0.3, 0), (there, 0.29, 0), (there, 0.9, 1), (elsewhere, 0.9, 0)]
        ):
            store.write([ImageAnswer(number, np.array(found), np.array([score]), np.array([label]))])
        assert list(store.gathered())
    paths = save_detection_misses(OneCat(tmp_path / "cat.png"), tmp_path / "answers", tmp_path / "misses", 9)
    assert [path.name for path in paths] == [f"{n:03d}_missed1_image{n}.png" for n in (1, 2, 3)]
