"""Weights from and to transformers: every name, the same outputs, and nothing lost but the label embedding."""

import dataclasses
import json
import shutil

import pytest
import torch
from golden_cases import caption_of, load_case, text_batch
from PIL import Image
from safetensors.torch import load_file, save_file

from groundingdino.checkpoints.convert import convert_file
from groundingdino.checkpoints.formats import huggingface
from groundingdino.checkpoints.formats.huggingface import LABEL_EMBEDDING
from groundingdino.checkpoints.model_file import SOURCE_KEY, load_detector, read_metadata, save_detector
from groundingdino.config import MODEL_PRESETS, swin_t
from groundingdino.model import build_detector
from groundingdino.structures import ImageBatch

transformers = pytest.importorskip("transformers", minversion="4.57")
OUTPUT_TOLERANCE = 1e-4  # absolute, float32, boxes in [0, 1] and logits; seen: 1e-7 and 2e-6


@pytest.fixture(scope="module")
def ours(golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "tiny.safetensors"
    convert_file(golden / "tiny/mmdet_checkpoint.pth", path)
    return path


@pytest.fixture(scope="module")
def folder(ours):
    convert_file(ours, ours.parent / "theirs", to="huggingface")
    return ours.parent / "theirs"


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) > 4,
    reason="from version 5 on names in memory differ from those in files; the other tests go through files",
)
@pytest.mark.parametrize("size", MODEL_PRESETS)
def test_every_tensor_of_a_released_size_has_its_place_in_transformers(size):
    config = MODEL_PRESETS[size]()
    with torch.device("meta"):
        ours = build_detector(config).state_dict()
        model = transformers.MMGroundingDinoForObjectDetection(
            transformers.MMGroundingDinoConfig(**huggingface.config_json(config))
        )
    twice = tuple(f"model.decoder.{heads}_embed." for heads in ("bbox", "class"))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith(twice)}
    theirs = huggingface.to_huggingface(ours, config)
    assert {name: tensor.shape for name, tensor in theirs.items()} == expected
    back = huggingface.to_native(theirs) | {LABEL_EMBEDDING: ours[LABEL_EMBEDDING]}
    assert {name: tensor.shape for name, tensor in back.items()} == {name: t.shape for name, t in ours.items()}
    assert huggingface.infer_config(back) == config


@pytest.mark.parametrize("case", ["categories_single", "rec_single", "spans_single"])
def test_transformers_computes_what_we_compute(ours, folder, case):
    description, tensors = load_case("infer", case)
    pixels = tensors["input"]
    text = text_batch([caption_of(prompt) for prompt in description["prompts"]])
    model, info = transformers.MMGroundingDinoForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        theirs = model.eval()(pixel_values=pixels, input_ids=text.token_ids, attention_mask=text.valid.long())
        valid = torch.ones(1, *pixels.shape[2:], dtype=torch.bool)
        answer = load_detector(ours)(ImageBatch(pixels, valid, padded=False), text).layers[-1]
    count = answer.logits.shape[-1]
    assert (theirs.pred_boxes - answer.boxes).abs().max() < OUTPUT_TOLERANCE
    assert (theirs.logits[..., :count] - answer.logits).abs().max() < OUTPUT_TOLERANCE
    assert theirs.logits[..., count:].max() == float("-inf")


def test_every_decoder_layer_keeps_its_own_head_in_transformers(ours, tmp_path):
    """The golden model has two layers, whose answers do not show it."""
    model = build_detector(dataclasses.replace(load_detector(ours).config, decoder_layers=4))
    save_detector(tmp_path / "four.safetensors", model)
    convert_file(tmp_path / "four.safetensors", tmp_path / "theirs", to="huggingface")
    theirs = transformers.MMGroundingDinoForObjectDetection.from_pretrained(tmp_path / "theirs")
    for layer, head in enumerate(model.decoder.box_heads):
        assert torch.equal(theirs.model.decoder.bbox_embed[layer].layers[0].weight, head.fc1.weight), layer
        assert torch.equal(theirs.bbox_embed[layer].layers[0].weight, head.fc1.weight), layer


def test_the_folder_gives_a_processor_with_our_token_ids(folder):
    processor = transformers.AutoProcessor.from_pretrained(folder)
    ids = processor.tokenizer("a cat. a remote control.")["input_ids"]
    assert ids == text_batch(["a cat. a remote control."]).token_ids[0].tolist()


@pytest.fixture(scope="module", params=["mm", "original"])
def either(request, folder, golden, tmp_path_factory):
    """A folder for each of transformers' two classes, which resizes images to little, for speed."""
    place = tmp_path_factory.mktemp(request.param)
    if request.param == "mm":
        shutil.copytree(folder, place / "theirs")
    else:
        convert_file(golden / "idea/idea_checkpoint.pth", place / "a.safetensors")
        convert_file(place / "a.safetensors", place / "theirs", to="huggingface")
    settings = json.loads((place / "theirs/preprocessor_config.json").read_text())
    settings["size"] = {"shortest_edge": 64, "longest_edge": 112}
    (place / "theirs/preprocessor_config.json").write_text(json.dumps(settings))
    return place / "theirs"


@pytest.fixture
def photo(golden):
    with Image.open(golden / "photos/train2014/COCO_train2014_000000000001.jpg") as image:
        return image.convert("RGB").resize((96, 64))


def test_the_folder_runs_in_transformers_pipeline(either, photo):
    detector = transformers.pipeline("zero-shot-object-detection", model=str(either))
    found = detector(photo, candidate_labels=["a man.", "a dog."], threshold=0.0)
    assert found and {row["label"] for row in found} <= {"a man.", "a dog."}
    assert all(0 <= row["score"] <= 1 and row["box"].keys() == {"xmin", "ymin", "xmax", "ymax"} for row in found)
    processor = transformers.AutoProcessor.from_pretrained(either)
    inputs = processor(images=photo, text="a man.", return_tensors="pt")
    with torch.no_grad():
        logits = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(either)(**inputs).logits
    best = max(row["score"] for row in found if row["label"] == "a man.")
    assert abs(best - logits.sigmoid().max().item()) < OUTPUT_TOLERANCE


def test_the_folder_runs_as_lang_segment_anything_calls_it(either, photo):
    processor = transformers.AutoProcessor.from_pretrained(either)
    model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(either).to("cpu")
    images, prompts = [photo, photo.rotate(90, expand=True)], ["a man. a dog.", "chair."]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt").to("cpu")
    with torch.no_grad():
        outputs = model(**inputs)
    results = processor.post_process_grounded_object_detection(
        outputs,
        inputs.input_ids,
        threshold=0.0,
        text_threshold=0.0,
        target_sizes=[image.size[::-1] for image in images],
    )
    assert len(results) == 2 and all(len(found["boxes"]) == len(found["scores"]) > 0 for found in results)
    assert all(bool(found["boxes"].isfinite().all()) for found in results)


@pytest.mark.parametrize("saved_by_them", [False, True])
def test_reading_back_loses_only_the_label_embedding(ours, folder, tmp_path, saved_by_them):
    source = folder
    if saved_by_them:
        source = tmp_path / "saved"
        transformers.MMGroundingDinoForObjectDetection.from_pretrained(folder).save_pretrained(source)
    report = convert_file(source, tmp_path / "back.safetensors")
    before, after = load_file(ours), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [LABEL_EMBEDDING]
    assert load_detector(tmp_path / "back.safetensors").config == load_detector(ours).config
    assert any("denoising label embedding: fresh" in line for line in report.lines())
    digests = [json.loads(read_metadata(path)[SOURCE_KEY])["tensors"] for path in (ours, tmp_path / "back.safetensors")]
    assert digests[0] == digests[1]


def test_transformers_weights_reach_mmdet_too(golden, folder, tmp_path):
    convert_file(folder / "model.safetensors", tmp_path / "theirs.pth", to="mmdet")
    found = torch.load(tmp_path / "theirs.pth", weights_only=True)["state_dict"]
    original = torch.load(golden / "tiny/mmdet_checkpoint.pth", weights_only=True)["state_dict"]
    assert found.keys() == original.keys()
    differing = [name for name in original if not torch.equal(found[name], original[name])]
    assert differing == ["dn_query_generator.label_embedding.weight"]


def test_heads_under_either_of_their_two_names_are_read(folder):
    state = load_file(folder / "model.safetensors")
    other = {f"model.decoder.{k}" if k.startswith("bbox_embed.1") else k: v for k, v in state.items()}
    expected = huggingface.to_native(state)
    for variant in (other, other | state):
        found = huggingface.to_native(variant)
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    state["model.decoder.bbox_embed.1.layers.0.bias"] = state["bbox_embed.1.layers.0.bias"] + 1
    with pytest.raises(ValueError, match=r"two different tensors both mean 'decoder\.box_heads\.1\.fc1\.bias'"):
        huggingface.to_native(state)


def test_a_third_of_an_attention_that_is_missing_is_named(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    for part in ("query", "value"):
        name = f"model.decoder.layers.0.self_attn.{part}.weight"
        save_file({k: v for k, v in state.items() if k != name}, tmp_path / "cut.safetensors")
        with pytest.raises(
            ValueError, match=r"query, key and value of 'decoder\.layers\.0\.self_attention\.in_proj_weight'"
        ):
            convert_file(tmp_path / "cut.safetensors", tmp_path / "out.safetensors")


def test_a_size_that_transformers_cannot_express_is_refused():
    with pytest.raises(ValueError, match=r"ties the fusion width \(512\)"):
        huggingface.config_json(dataclasses.replace(swin_t(), fusion_width=512))
    with pytest.raises(ValueError, match="ties the heads"):
        huggingface.config_json(dataclasses.replace(swin_t(), fusion_heads=8))
