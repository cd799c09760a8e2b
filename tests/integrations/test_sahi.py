"""Our detector as SAHI's own detection model, through SAHI's sliced prediction."""

import numpy as np
import pytest
import torch
from golden_cases import tiny_model

from groundingdino.inference.learned_prompt import LearnedPrompt
from groundingdino.inference.predictor import Predictor
from groundingdino.inputs.images import open_image

pytest.importorskip("sahi")
NAMES = ["cat", "man", "flag"]


@pytest.fixture(scope="module")
def detector():
    from groundingdino.integrations.sahi import SahiDetector

    return SahiDetector(Predictor(tiny_model(), scale=(96, 160)), NAMES, confidence_threshold=0.02)


@pytest.fixture(scope="module")
def image(golden):
    return np.asarray(open_image(golden / "photos/train2014/COCO_train2014_000000000001.jpg"))


def test_a_prediction_carries_class_indices_and_the_predictors_boxes(detector, image):
    from sahi.predict import get_prediction

    found = get_prediction(image, detector).object_prediction_list
    own = detector.model.predict(image, categories=NAMES, threshold=0.02)
    assert [p.category.id for p in found] == own.labels.tolist() and len(found) > 0
    assert [p.category.name for p in found] == list(own.names)
    np.testing.assert_allclose([p.bbox.to_xyxy() for p in found], own.boxes.numpy(), atol=1)


def test_a_learned_prompt_is_called_by_its_name(detector, tmp_path):
    from groundingdino.integrations.sahi import SahiDetector

    LearnedPrompt("cat", torch.full((1, 256), 0.5), "tiny").save(tmp_path / "x.prompt")
    learned = SahiDetector(detector.model, [str(tmp_path / "x.prompt"), *NAMES[1:]])
    assert list(learned.category_mapping.values()) == NAMES


def test_slices_are_shifted_to_the_whole_image_one_by_one_and_in_batches(detector, image):
    from sahi.predict import get_sliced_prediction

    height, width = image.shape[:2]
    options = {"slice_height": height, "slice_width": width // 2, "overlap_width_ratio": 0.0, "verbose": 0}
    options |= {"perform_standard_pred": False, "postprocess_type": "NMS", "postprocess_match_threshold": 1.0}
    found = get_sliced_prediction(image, detector, **options).object_prediction_list
    right = detector.model.predict(image[:, width // 2 :], categories=NAMES, threshold=0.02)
    assert len(found) > len(right.boxes)
    boxes = np.array([p.bbox.to_xyxy() for p in found])
    best = right.boxes[0].numpy() + [width // 2, 0, width // 2, 0]
    assert np.abs(boxes - best).max(axis=1).min() < 1
