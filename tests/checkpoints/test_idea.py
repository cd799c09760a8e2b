"""IDEA's weights: what IDEA's own code computes from them, and back bit for bit."""

import json
import math
from pathlib import Path

import pytest
import torch
from golden_cases import image_batch, text_batch
from safetensors.torch import load_file

from groundingdino.checkpoints.convert import convert_file
from groundingdino.checkpoints.formats import huggingface, idea, mmdet, original_head
from groundingdino.checkpoints.formats.original_head import LABEL_EMBEDDING
from groundingdino.checkpoints.model_file import load_detector, save_detector
from groundingdino.config import MODEL_PRESETS
from groundingdino.model import build_detector

FILES = Path(__file__).parent.parent / "golden" / "idea"
TAP_TOLERANCE = 1e-4  # absolute, float32: the project's bound; seen: 7e-6
CASES = json.loads((FILES / "cases.json").read_text())
SINGLE = ("single_categories", "single_sentence", "border")


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("idea") / "tiny.safetensors"
    convert_file(FILES / "idea_checkpoint.pth", path, text_heads=2)
    return path


@pytest.fixture(scope="module")
def theirs() -> dict[str, torch.Tensor]:
    return torch.load(FILES / "idea_checkpoint.pth", weights_only=True)["model"]


def predict(model, pixels, sizes, captions):
    """The detector's output, and its inner values by the golden files' names."""
    taps = {}
    memory = model.feature_enhancer.register_forward_hook(lambda *call: taps.update(enhanced=call[-1]))
    layers = [
        layer.register_forward_hook(lambda *call, i=i: taps.update({f"query.{i}": call[-1]}))
        for i, layer in enumerate(model.decoder.layers)
    ]
    text = text_batch(captions)
    with torch.no_grad():
        taps |= {f"backbone.{i}": found for i, found in enumerate(model.backbone(pixels))}
        taps["text_feat"] = model.encode_text(text)
        output = model(image_batch(pixels, sizes), text)
        taps |= {f"hs.{i}": model.decoder.norm(taps.pop(f"query.{i}")) for i in range(len(layers))}
    for hook in (memory, *layers):
        hook.remove()
    image, context = taps.pop("enhanced")
    return output, taps | {"memory": image.tokens, "memory_text": context.tokens / 16}


@pytest.mark.parametrize("case", SINGLE)
def test_every_value_is_what_ideas_own_code_computes(converted, case):
    golden = load_file(FILES / f"{case}.safetensors")
    output, taps = predict(
        load_detector(converted), golden["input"], CASES[case]["image_sizes_hw"], CASES[case]["captions"]
    )
    for name, found in taps.items():
        assert (found - golden[name]).abs().max() < TAP_TOLERANCE, name
    logits, boxes = output.layers[-1].logits, output.layers[-1].boxes
    assert (logits - golden["pred_logits"][..., : logits.shape[-1]]).abs().max() < TAP_TOLERANCE
    assert (boxes - golden["pred_boxes"]).abs().max() < TAP_TOLERANCE
    assert golden["pred_logits"][..., logits.shape[-1] :].max() == float("-inf")
    assert {"memory", "memory_text", "text_feat", "backbone.2", "hs.0", "hs.1"} <= taps.keys()


def test_a_box_at_the_border_shows_ideas_own_clamp(converted):
    """With mmdet's eps such a box comes out elsewhere: the config field is needed."""
    model = load_detector(converted)
    assert model.config.box_eps == 1e-3
    golden, case = load_file(FILES / "border.safetensors"), CASES["border"]
    with torch.no_grad():
        model.query_selection.box_head.fc3.bias[2] += 20  # first boxes as wide as the image
        found = [predict(model, golden["input"], case["image_sizes_hw"], case["captions"])[0]]
        model.decoder.box_eps = 1e-5
        found.append(predict(model, golden["input"], case["image_sizes_hw"], case["captions"])[0])
    assert (found[0].layers[0].boxes - found[1].layers[0].boxes).abs().max() > 10 * TAP_TOLERANCE


def test_an_image_in_a_batch_gets_what_it_gets_alone(converted):
    golden, case = load_file(FILES / "batch.safetensors"), CASES["batch"]
    model, sizes = load_detector(converted), case["image_sizes_hw"]
    output, taps = predict(model, golden["input"], sizes, case["captions"])
    for name in ("backbone.0", "backbone.1", "backbone.2", "text_feat"):
        valid = golden[name].abs() > 0 if name == "text_feat" else ...
        assert (taps[name][valid] - golden[name][valid]).abs().max() < TAP_TOLERANCE, name
    for i, (height, width) in enumerate(sizes):
        if golden["input"].shape[2:] != (height, width):
            continue  # padding of pixels is seen by the backbone, in IDEA's code too
        alone, _ = predict(model, golden["input"][i : i + 1], [sizes[i]], case["captions"][i : i + 1])
        tokens = alone.layers[-1].logits.shape[-1]
        assert (output.layers[-1].logits[i : i + 1, :, :tokens] - alone.layers[-1].logits).abs().max() < TAP_TOLERANCE
        assert (output.layers[-1].boxes[i : i + 1] - alone.layers[-1].boxes).abs().max() < TAP_TOLERANCE


@pytest.mark.parametrize("name", ["GroundingDINO_SwinT_OGC", "GroundingDINO_SwinB_cfg"])
def test_every_tensor_of_a_released_size_goes_over_and_back(name):
    shapes = json.loads((FILES / "state_dict_shapes.json").read_text())[name]
    state = {k.removeprefix("module."): torch.zeros(1).expand(v) for k, v in shapes.items()}  # one number: no memory
    state |= {"label_enc.weight": torch.zeros(1), "bert.embeddings.position_ids": torch.zeros(1)}  # of released files
    native = original_head.from_original(idea.to_native(state))
    config = MODEL_PRESETS[{"GroundingDINO_SwinT_OGC": "swin_t", "GroundingDINO_SwinB_cfg": "swin_b"}[name]]()
    with torch.device("meta"):
        expected = build_detector(config).state_dict()
    label = expected.pop(LABEL_EMBEDDING)
    assert {k: v.shape for k, v in native.items()} == {k: v.shape for k, v in expected.items()}
    assert huggingface.infer_config(native | {LABEL_EMBEDDING: label}) == config
    assert {f"module.{k}" for k in idea.to_idea(native, config)} == shapes.keys()


def test_converting_back_is_bit_equal_but_for_what_idea_never_uses(converted, theirs, tmp_path):
    report = convert_file(converted, tmp_path / "back.pth", to="idea")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert back.keys() == theirs.keys()
    differing = {name for name in theirs if not torch.equal(back[name], theirs[name])}
    assert differing == {"module.bert.pooler.dense.weight", "module.bert.pooler.dense.bias"}
    assert any("BERT's pooler" in line for line in report.lines())


def test_the_report_says_what_was_made_up_and_what_was_left_out(tmp_path):
    report = convert_file(FILES / "idea_checkpoint.pth", tmp_path / "a.safetensors", text_heads=2)
    text = "\n".join(report.lines())
    assert "denoising label embedding: fresh" in text and "head without bias" in text and "BERT's pooler" in text


def test_a_head_of_mm_grounding_dino_cannot_be_written_as_ideas(golden, tmp_path):
    convert_file(golden / "tiny/mmdet_checkpoint.pth", tmp_path / "mm.safetensors")
    with pytest.raises(ValueError, match=r"the original head has no bias, .* cannot be written as IDEA's") as refusal:
        convert_file(tmp_path / "mm.safetensors", tmp_path / "x.pth", to="idea")
    assert "\n" not in str(refusal.value) and not (tmp_path / "x.pth").exists()


def test_box_heads_that_differ_cannot_be_written_as_ideas(converted, tmp_path):
    model = load_detector(converted)
    with torch.no_grad():
        model.decoder.box_heads[1].fc1.bias += 1
    save_detector(tmp_path / "tuned.safetensors", model)
    with pytest.raises(ValueError, match=r"one box head for all decoder layers, 'decoder\.box_heads\.1\.fc1\.bias'"):
        convert_file(tmp_path / "tuned.safetensors", tmp_path / "x.pth", to="idea")


def test_a_box_head_whose_two_names_disagree_is_refused(theirs, tmp_path):
    name = "module.transformer.decoder.bbox_embed.1.layers.0.bias"
    torch.save({"model": {**theirs, name: theirs[name] + 1}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"two different tensors both mean 'decoder\.box_heads\.1\.fc1\.bias'"):
        convert_file(tmp_path / "x.pth", tmp_path / "x.safetensors")


def mmdets_form(converted, folder: Path) -> dict[str, torch.Tensor]:
    """The same weights as mmdet's configs/grounding_dino have them: no bias, a box head per layer and for proposals."""
    convert_file(converted, folder / "mm.pth", to="mmdet")
    state = torch.load(folder / "mm.pth", weights_only=True)["state_dict"]
    native = original_head.to_original(load_file(converted))
    for part in ("weight", "bias"):  # mmdet keeps the text features as IDEA does
        state[f"encoder.text_layers.1.norms.1.{part}"] = native[f"feature_enhancer.layers.1.text_layer.ffn_norm.{part}"]
    for i in range(2):
        kept = native[f"decoder.layers.{i}.text_attention.in_proj_weight"]
        state[f"decoder.layers.{i}.cross_attn_text.attn.in_proj_weight"] = kept
    return {name: tensor for name, tensor in state.items() if "cls_branches" not in name}


def test_mmdets_form_of_the_original_is_read(converted, tmp_path):
    torch.save({"state_dict": mmdets_form(converted, tmp_path)}, tmp_path / "original.pth")
    convert_file(tmp_path / "original.pth", tmp_path / "back.safetensors", text_heads=2)
    before, after = load_file(converted), load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_detector(tmp_path / "back.safetensors").config.box_eps == 1e-5  # mmdet's own


@pytest.fixture(scope="module")
def coco_tuned(converted, tmp_path_factory) -> Path:
    """As mmdet's fine-tunes of the original on COCO: a learned scale in each head, and 80 denoising labels."""
    folder = tmp_path_factory.mktemp("coco")
    state = mmdets_form(converted, folder)
    state |= {f"bbox_head.cls_branches.{i}.log_scale": torch.tensor([0.25 * (i - 1)]) for i in range(3)}
    state["dn_query_generator.label_embedding.weight"] = torch.randn(80, 256)
    pooler = "language_model.language_backbone.body.model.pooler.dense"
    torch.save({"state_dict": state | {f"{pooler}.bias": torch.zeros(32)}}, folder / "coco.pth")
    return folder / "coco.pth"


def test_a_learned_scale_multiplies_the_logits_of_its_layer(converted, coco_tuned, tmp_path):
    report = convert_file(coco_tuned, tmp_path / "coco.safetensors", text_heads=2)
    tuned, plain = load_detector(tmp_path / "coco.safetensors"), load_detector(converted)
    assert tuned.config.learned_scale and tuned.config.num_labels == 80 and not plain.config.learned_scale
    assert report.dropped == {mmdet.POOLER_REASON: 1, mmdet.INDEX_REASON: 8}
    golden, case = load_file(FILES / "single_categories.safetensors"), CASES["single_categories"]
    plain.decoder.box_eps = tuned.decoder.box_eps
    found, expected = (
        predict(model, golden["input"], case["image_sizes_hw"], case["captions"])[0] for model in (tuned, plain)
    )
    for i, (layer, unscaled) in enumerate(zip(found.layers, expected.layers, strict=True)):
        scale = math.exp(0.25 * (i - 1))
        torch.testing.assert_close(layer.logits, unscaled.logits * scale, atol=TAP_TOLERANCE, rtol=0)
        assert torch.equal(layer.boxes, unscaled.boxes)


def test_a_learned_scale_goes_back_to_mmdet_and_nowhere_else(coco_tuned, tmp_path):
    convert_file(coco_tuned, tmp_path / "coco.safetensors", text_heads=2)
    convert_file(tmp_path / "coco.safetensors", tmp_path / "back.pth", to="mmdet")
    before = torch.load(coco_tuned, weights_only=True)["state_dict"]
    after = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert before.keys() - after.keys() == {name for name in before if "pooler" in name}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    for to in ("idea", "huggingface"):
        with pytest.raises(ValueError, match="no place for|one box head for all") as refusal:
            convert_file(tmp_path / "coco.safetensors", tmp_path / to, to=to)
        assert "\n" not in str(refusal.value) and not (tmp_path / to).exists()


transformers = pytest.importorskip("transformers", minversion="4.57")


def test_transformers_original_class_computes_the_same_and_comes_back(converted, tmp_path):
    convert_file(converted, tmp_path / "folder", to="huggingface")
    model, info = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert type(model).__name__ == "GroundingDinoForObjectDetection"
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    golden, case = load_file(FILES / "single_categories.safetensors"), CASES["single_categories"]
    text = text_batch(case["captions"])
    with torch.no_grad():
        found = model.eval()(golden["input"], text.token_ids, attention_mask=text.valid.long())
    count = text.token_ids.shape[1]
    assert (found.logits[..., :count] - golden["pred_logits"][..., :count]).abs().max() < TAP_TOLERANCE
    assert (found.pred_boxes - golden["pred_boxes"]).abs().max() < TAP_TOLERANCE
    model.save_pretrained(tmp_path / "saved")
    for source in ("folder", "saved"):
        convert_file(tmp_path / source, tmp_path / f"{source}.safetensors")
        before, after = load_file(converted), load_file(tmp_path / f"{source}.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert load_detector(tmp_path / f"{source}.safetensors").config == load_detector(converted).config
