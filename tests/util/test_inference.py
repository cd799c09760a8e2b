"""Code written against IDEA's package runs on ours: its README's snippet, its classes, and a client from PyPI."""

import inspect
import shutil
import sys

import numpy as np
import pytest
import torch
from golden_cases import tiny_model
from PIL import Image

from groundingdino import Referring
from groundingdino.boxes import cxcywh_to_xyxy
from groundingdino.checkpoints.model_file import save_detector
from groundingdino.inference import predictor
from groundingdino.inference.predictor import load_model as load_predictor
from groundingdino.inputs.images import resize_for_inference
from groundingdino.util import inference

SCALE = (96, 160)


@pytest.fixture(scope="module", params=["ours", "ideas"])
def checkpoint(tmp_path_factory, request, golden):
    """A file with the name that IDEA's README gives it: a checkpoint of ours, or one that IDEA's code saved."""
    path = tmp_path_factory.mktemp("weights") / "groundingdino_swint_ogc.pth"
    if request.param == "ours":
        save_detector(path, tiny_model())
    else:
        shutil.copy(golden / "idea/idea_checkpoint.pth", path)
    return path


@pytest.fixture
def small(monkeypatch):
    """Images go in small, for speed."""
    monkeypatch.setattr(inference, "resize_for_inference", lambda image: resize_for_inference(image, SCALE))
    monkeypatch.setattr(predictor, "resize_for_inference", lambda image, scale: resize_for_inference(image, SCALE))


@pytest.fixture(scope="module")
def photo(golden):
    return golden / "photos" / "train2014" / "COCO_train2014_000000000001.jpg"


def test_the_snippet_of_ideas_readme_runs(checkpoint, photo, small):
    from groundingdino.util.inference import annotate, load_image, load_model, predict

    model = load_model("groundingdino/config/GroundingDINO_SwinT_OGC.py", checkpoint, device="cpu")
    TEXT_PROMPT = "chair . person . dog ."
    BOX_TRESHOLD = 0.02
    TEXT_TRESHOLD = 0.01

    image_source, image = load_image(photo)
    boxes, logits, phrases = predict(
        model=model, image=image, caption=TEXT_PROMPT, box_threshold=BOX_TRESHOLD, text_threshold=TEXT_TRESHOLD
    )
    annotated_frame = annotate(image_source=image_source, boxes=boxes, logits=logits, phrases=phrases)

    assert image_source.dtype == np.uint8 and image_source.shape == (256, 256, 3)
    assert image.dtype == torch.float32 and image.shape[0] == 3
    assert len(boxes) == len(logits) == len(phrases) > 5
    assert ((boxes >= 0) & (boxes <= 1)).all() and (logits > BOX_TRESHOLD).all()
    assert all(set(phrase.split()) <= {"chair", "person", "dog"} for phrase in phrases) and any(phrases)
    assert annotated_frame.shape == image_source.shape and annotated_frame.dtype == np.uint8
    assert not np.array_equal(annotated_frame, image_source[:, :, ::-1])


def test_boxes_and_scores_are_those_of_the_best_token(checkpoint, photo, small):
    model = inference.load_model(None, checkpoint, "cpu")
    source, image = inference.load_image(photo)
    boxes, logits, _ = inference.predict(model, image, "the man.", 0.0, 0.0)
    ours = load_predictor(checkpoint, "cpu").predict(source, Referring("the man."), threshold=0.0, top_k=100)
    assert len(boxes) == 60
    order = logits.argsort(descending=True)
    torch.testing.assert_close(logits[order], ours.scores, atol=1e-6, rtol=0)
    corners = cxcywh_to_xyxy(boxes[order]).clamp(0, 1) * 256  # IDEA does not clip
    assert (corners - ours.boxes).abs().amax(dim=1).median() < 1e-3


def test_phrases_keep_words_whole_and_combined_ones_can_be_avoided():
    caption = "skateboarder. hand-held umbrella."
    encoded = inference.default_tokenizer().encode(caption)  # skate ##board ##er . hand - held umbrella .
    scores = torch.tensor([0.9, 0.5, 0.5, 0.6, 0.9, 0.1, 0.5, 0.5, 0.7, 0.9, 0.9])
    assert len(scores) == len(encoded.token_ids)
    assert inference.phrase_of(scores, encoded, caption, 0.3, False) == "skateboarder -held umbrella"
    scores[[0, 4, 9, 10]] = 0.0
    assert inference.phrase_of(scores, encoded, caption, 0.3, True) == "-held umbrella"
    assert inference.phrase_of(torch.zeros(11), encoded, caption, 0.3, False) == ""


def test_signatures_are_ideas():
    expected = {
        inference.load_model: ["model_config_path", "model_checkpoint_path", "device", "text_encoder_type"],
        inference.load_image: ["image_path"],
        inference.predict: "model image caption box_threshold text_threshold device remove_combined".split(),
        inference.annotate: ["image_source", "boxes", "logits", "phrases"],
        inference.Model: ["model_config_path", "model_checkpoint_path", "device"],
        inference.Model.predict_with_caption: "self image caption box_threshold text_threshold".split(),
        inference.Model.predict_with_classes: "self image classes box_threshold text_threshold".split(),
        inference.Model.post_process_result: ["source_h", "source_w", "boxes", "logits"],
        inference.Model.phrases2classes: ["phrases", "classes"],
    }
    for function, names in expected.items():
        assert list(inspect.signature(function).parameters) == names


def test_a_caption_that_idea_would_cut_off_is_refused():
    with pytest.raises(ValueError, match="303 tokens long, the model reads 256"):
        inference.predict(tiny_model(), torch.zeros(3, 8, 8), "cat " * 300, 0.3, 0.3)
    assert inference.preprocess_caption("  A Cat ") == "a cat." == inference.preprocess_caption("a cat.")


def test_the_class_takes_bgr_and_returns_supervision(checkpoint, photo, small):
    supervision = pytest.importorskip("supervision")
    model = inference.Model(model_config_path="x.py", model_checkpoint_path=str(checkpoint), device=torch.device("cpu"))
    bgr = np.asarray(Image.open(photo).convert("RGB"))[:, :, ::-1]
    detections, phrases = model.predict_with_caption(bgr, "person . dog .", box_threshold=0.02, text_threshold=0.01)
    assert isinstance(detections, supervision.Detections)
    assert len(detections) == len(phrases) > 5 and detections.class_id is None
    assert detections.xyxy.max() <= 300 and (detections.confidence > 0.02).all()

    classes = ["person", "dog"]
    detections = model.predict_with_classes(bgr, classes=classes, box_threshold=0.01, text_threshold=0.25)
    assert set(detections.class_id.tolist()) <= {0, 1} and len(detections) > 5
    assert len({tuple(box) for box in detections.xyxy.tolist()}) == len(detections)  # one class a box
    ours = load_predictor(checkpoint, "cpu").predict(bgr[:, :, ::-1], categories=classes, threshold=0.01)
    assert detections.confidence[0] == ours.scores[0].item()
    assert model.phrases2classes(["a dog", "person dog", "cat"], classes).tolist() == [1, 0, None]


def test_autodistills_grounding_dino_runs_unchanged(checkpoint, photo, small, tmp_path, monkeypatch):
    """A client from PyPI that nobody here wrote. It looks for weights in ~/.cache, so they are put there."""
    pytest.importorskip("autodistill_grounding_dino")
    from autodistill.detection import CaptionOntology
    from autodistill_grounding_dino import GroundingDINO

    assert hasattr(sys.modules["groundingdino"], "tune_process")  # ours, not rf-groundingdino's
    cache = tmp_path / ".cache" / "autodistill" / "groundingdino"
    cache.mkdir(parents=True)
    (cache / "groundingdino_swint_ogc.pth").write_bytes(checkpoint.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    client = GroundingDINO(
        ontology=CaptionOntology({"orange space suit": "suit", "flag": "flag"}),
        box_threshold=0.005,
        text_threshold=0.01,
    )
    found = client.predict(str(photo))
    assert set(found.class_id.tolist()) == {0, 1} and len(found) > 5
    assert np.isfinite(found.xyxy).all() and (found.confidence >= 0.005).all()
