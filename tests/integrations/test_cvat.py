"""The CVAT auto-annotation function, by CVAT's own classes."""

import pytest
import torch
from golden_cases import tiny_model
from PIL import Image

from groundingdino.inference.learned_prompt import LearnedPrompt
from groundingdino.inference.predictor import Predictor

auto_annotation = pytest.importorskip("cvat_sdk.auto_annotation")
NAMES = ["a cat", "person"]


class Context(auto_annotation.DetectionFunctionContext):
    frame_name = "photo.jpg"
    conv_mask_to_poly = False
    conf_threshold = None


@pytest.fixture(scope="module")
def predictor():
    return Predictor(tiny_model(), scale=(96, 160))


def test_the_function_annotates_with_the_labels_of_its_spec(predictor, golden):
    from groundingdino.integrations.cvat import AnnotationFunction

    image = Image.open(golden / "photos/train2014/COCO_train2014_000000000001.jpg")
    function, context = AnnotationFunction(predictor, NAMES), Context()
    assert [(label.id, label.name) for label in function.spec.labels] == [(0, "a cat"), (1, "person")]
    context.conf_threshold = 0.0
    every = function.detect(context, image)
    context.conf_threshold = every[4].score
    best = function.detect(context, image)
    found = predictor.predict(image, categories=NAMES, threshold=0.0)
    assert len(every) == len(found.boxes) and 5 <= len(best) < len(every)
    assert [shape.label_id for shape in every] == found.labels.tolist()
    assert every[0].points == found.boxes[0].tolist() and str(every[0].type) == "rectangle" and every[0].frame == 0
    assert not hasattr(every[0], "id") and not hasattr(every[0], "source")


def test_a_learned_prompt_is_called_by_its_name(predictor, tmp_path):
    from groundingdino.integrations.cvat import AnnotationFunction

    LearnedPrompt("a cat", torch.full((2, 256), 0.5), "tiny").save(tmp_path / "cat.prompt")
    function = AnnotationFunction(predictor, [str(tmp_path / "cat.prompt"), "person"])
    assert [label.name for label in function.spec.labels] == NAMES


def test_cvats_command_line_finds_its_entry(tmp_path, golden):
    from groundingdino.checkpoints.model_file import save_detector
    from groundingdino.integrations import cvat

    save_detector(tmp_path / "tiny.safetensors", tiny_model())
    function = cvat.create(checkpoint=str(tmp_path / "tiny.safetensors"), names="a cat, person", device="cpu")
    assert [label.name for label in function.spec.labels] == NAMES
