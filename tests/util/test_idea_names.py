"""The further names that clients of IDEA's code import, together and with IDEA's own weights."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import groundingdino.config
from groundingdino.datasets import transforms as T
from groundingdino.models import build_model
from groundingdino.util import box_ops
from groundingdino.util.inference import Model, load_model, predict
from groundingdino.util.slconfig import SLConfig
from groundingdino.util.utils import clean_state_dict, get_phrases_from_posmap

FILES = Path(__file__).parent.parent / "golden" / "idea"
CASES = json.loads((FILES / "cases.json").read_text())
ROUNDING = 1e-6  # of a score near 1
TOLERANCE = 1e-4  # absolute, float32: the project's bound for values that IDEA computed


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """IDEA's checkpoint under the name that its README gives it."""
    path = tmp_path_factory.mktemp("weights") / "groundingdino_swint_ogc.pth"
    shutil.copy(FILES / "idea_checkpoint.pth", path)
    return path


@pytest.mark.parametrize("case", ["single_categories", "single_sentence", "border"])
def test_ideas_weights_and_calls_give_what_ideas_predict_returned(weights, case):
    expected, pixels = CASES[case]["predict"], load_file(FILES / f"{case}.safetensors")["input"][0]
    model = load_model("groundingdino/config/GroundingDINO_SwinT_OGC.py", str(weights), device="cpu")
    thresholds = expected["box_threshold"], expected["text_threshold"]
    boxes, scores, phrases = predict(model, pixels, CASES[case]["captions"][0], *thresholds)
    # The threshold is the score of one box, which rounding puts on either side: that one may be there or not.
    sure = scores > thresholds[0] + ROUNDING
    theirs = torch.tensor(expected["logits"]) > thresholds[0] + ROUNDING
    assert sure.sum() == theirs.sum() >= 8
    assert (~sure).sum() <= 1 and (~theirs).sum() <= 1
    assert (boxes[sure] - torch.tensor(expected["boxes"])[theirs]).abs().max() < TOLERANCE
    assert (scores[sure] - torch.tensor(expected["logits"])[theirs]).abs().max() < TOLERANCE
    # IDEA leaves a space where it takes a "." out of a phrase.
    assert [phrases[i] for i in sure.nonzero()] == [" ".join(expected["phrases"][i].split()) for i in theirs.nonzero()]


def test_all_six_modules_of_the_surface_are_imported_together():
    """segment-geospatial installs another package over this one when one of them fails."""
    names = {
        "util.inference": ("load_model", "load_image", "predict", "annotate", "Model"),
        "util.box_ops": ("box_cxcywh_to_xyxy",),
        "util.utils": ("clean_state_dict", "get_phrases_from_posmap"),
        "util.slconfig": ("SLConfig",),
        "models": ("build_model",),
        "datasets.transforms": ("Compose", "RandomResize", "ToTensor", "Normalize"),
    }
    for module, wanted in names.items():
        found = importlib.import_module(f"groundingdino.{module}")
        assert all(hasattr(found, name) for name in wanted), module


def test_ideas_weights_are_converted_in_memory(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("GROUNDINGDINO_CACHE", str(tmp_path / "cache"))
    model = load_model("groundingdino/config/GroundingDINO_SwinT_OGC.py", str(weights), device="cpu")
    assert not (tmp_path / "cache").exists()
    places = {parameter.data_ptr() for parameter in model.parameters()}
    assert len(places) == len(list(model.parameters()))  # though the file has one box head for all layers


def test_sizes_of_a_config_file_that_are_not_those_of_the_weights_are_named(weights, tmp_path):
    """The lines of IDEA's GroundingDINO_SwinT_OGC.py that say something about size."""
    lines = "hidden_dim = 256\nnheads = 8\nnum_feature_levels = 4\nenc_n_points = 4\ndec_n_points = 4\n"
    (tmp_path / "cfg.py").write_text(lines)
    load_model(tmp_path / "cfg.py", weights, "cpu")
    (tmp_path / "cfg.py").write_text(lines + "num_queries = 900\nenc_layers = 6\n")
    with pytest.raises(
        ValueError, match=r"is not of these weights: enc_layers is 2, not 6; num_queries is 60, not 900"
    ):
        load_model(tmp_path / "cfg.py", weights, "cpu")


def test_a_config_file_that_names_another_backbone_is_pointed_out(weights, tmp_path):
    (tmp_path / "cfg.py").write_text('backbone = "swin_B_384_22k"\nbatch_size = __import__("os").system("false")\n')
    with pytest.raises(ValueError, match="the backbone has a width of 16, swin_B_384_22k one of 128"):
        load_model(tmp_path / "cfg.py", weights, "cpu", text_encoder_type="/some/bert")


def test_a_config_file_is_read_without_being_run(tmp_path):
    (tmp_path / "cfg.py").write_text(
        f'backbone = "swin_T_224_1k"\nnum_queries = 900\nevil = open({str(tmp_path / "flag")!r}, "w")\n'
    )
    config = SLConfig.fromfile(tmp_path / "cfg.py")
    assert config.backbone == "swin_T_224_1k" and config["num_queries"] == 900 and "evil" not in config
    assert config.get("absent", 3) == 3 and not (tmp_path / "flag").exists()


def test_a_model_built_from_a_config_takes_ideas_state_dict(monkeypatch, weights):
    """As segment-geospatial loads it."""
    tiny = load_model(None, weights, "cpu")
    monkeypatch.setitem(groundingdino.models.BACKBONES, "swin_T_224_1k", lambda: tiny.config)
    args = SLConfig({"backbone": "swin_T_224_1k"})
    args.device = "cpu"
    model = build_model(args).to("cpu").eval()
    checkpoint = torch.load(weights, map_location="cpu", weights_only=True)
    model.load_state_dict(clean_state_dict(checkpoint["model"]), strict=False)
    expected = tiny.state_dict()
    found = model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected if "label_embedding" not in name)
    del checkpoint["model"]["module.transformer.level_embed"]
    with pytest.raises(RuntimeError):
        model.load_state_dict(clean_state_dict(checkpoint["model"]), strict=True)
    with pytest.raises(ValueError, match="backbone 'resnet50' is not one of IDEA's released models"):
        build_model(SLConfig({"backbone": "resnet50"}))
    with pytest.raises(ValueError, match="not one of IDEA's released models: num_queries is 60, not 100"):
        build_model(SLConfig({"backbone": "swin_T_224_1k", "num_queries": 100}))


def test_a_model_survives_being_made_without_its_constructor(weights):
    """As Roboflow's inference makes it."""
    model = Model.__new__(Model)
    model.model, model.device = load_model(None, weights, "cpu"), "cpu"
    found = model.predict_with_classes(np.zeros((40, 60, 3), np.uint8), ["cat", "dog"], 0.0, 0.0)
    assert len(found) > 0


def test_phrases_come_from_the_tokens_that_are_set(weights):
    tokenizer = load_model(None, weights, "cpu").tokenizer
    tokenized = tokenizer("cat . remote control .")
    posmap = torch.zeros(256, dtype=torch.bool)
    posmap[[0, 3, 4, 255]] = True
    assert get_phrases_from_posmap(posmap, tokenized, tokenizer) == "remote control"
    assert posmap[0]  # the argument is as it was
    with pytest.raises(NotImplementedError):
        get_phrases_from_posmap(posmap[None], tokenized, tokenizer)


def test_transforms_resize_as_ideas_do():
    transform = T.Compose(
        [T.RandomResize([800], max_size=1333), T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    )
    for size, expected in (((640, 480), (800, 1066)), ((480, 640), (1066, 800)), ((2000, 500), (333, 1332))):
        tensor, target = transform(Image.new("RGB", size, (124, 116, 104)), None)
        assert tensor.shape == (3, *expected) and target is None and tensor.abs().max() < 0.02
    with pytest.raises(ValueError, match="boxes are not resized here"):
        transform(Image.new("RGB", (64, 64)), {"boxes": []})


def test_boxes_are_converted_as_ideas_are():
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    corners = torch.tensor([[0.4, 0.3, 0.6, 0.7]])
    assert torch.allclose(box_ops.box_cxcywh_to_xyxy(boxes), corners)
    assert torch.allclose(box_ops.box_xyxy_to_cxcywh(corners), boxes)
    assert box_ops.generalized_box_iou(corners, corners).shape == (1, 1)


def test_the_folder_of_the_config_module_is_known():
    """Roboflow's inference looks for IDEA's config files beside it; they need not exist."""
    assert Path(groundingdino.config.__file__).parent.is_dir()
