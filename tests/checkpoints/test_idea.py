"""IDEA's weights: what IDEA's own code computes from them, and back bit for bit."""

import json
import math
from pathlib import Path

import pytest
import torch
from golden_cases import image_batch, text_batch
from safetensors.torch import load_file
from training_runs import scenes

from groundingdino.checkpoints.convert import convert_file
from groundingdino.checkpoints.formats import huggingface, idea, mmdet, original_head
from groundingdino.checkpoints.formats.original_head import LABEL_EMBEDDING
from groundingdino.checkpoints.model_file import SOURCE_KEY, load_detector, read_metadata, save_detector
from groundingdino.config import MODEL_PRESETS, DataConfig, TrainConfig
from groundingdino.model import build_detector
from groundingdino.model.heads import inverse_sigmoid
from groundingdino.training.trainer import fit

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
    selection = model.query_selection.register_forward_hook(lambda *call: taps.update({"reference.0": call[-1].boxes}))
    layers = [
        layer.register_forward_hook(lambda *call, i=i: taps.update({f"query.{i}": call[-1]}))
        for i, layer in enumerate(model.decoder.layers)
    ]
    steps = []  # of the plain queries, by which the next layer's reference boxes differ
    heads = [head.register_forward_hook(lambda *call: steps.append(call[-1][1])) for head in model.decoder.box_heads]
    text = text_batch(captions)
    with torch.no_grad():
        taps |= {f"backbone.{i}": found for i, found in enumerate(model.backbone(pixels))}
        taps["text_feat"] = model.encode_text(text)
        output = model(image_batch(pixels, sizes), text)
        taps |= {f"hs.{i}": model.decoder.norm(taps.pop(f"query.{i}")) for i in range(len(layers))}
    for hook in (memory, selection, *layers, *heads):
        hook.remove()
    for i, step in enumerate(steps):
        taps[f"reference.{i + 1}"] = (step + inverse_sigmoid(taps[f"reference.{i}"], eps=1e-3)).sigmoid()
    image, context = taps.pop("enhanced")
    taps |= {"pred_logits": output.layers[-1].logits, "pred_boxes": output.layers[-1].boxes}
    return output, taps | {"memory": image.tokens, "memory_text": context.tokens / 16}


@pytest.mark.parametrize("case", SINGLE)
def test_every_value_is_what_ideas_own_code_computes(converted, case):
    golden = load_file(FILES / f"{case}.safetensors")
    _, taps = predict(
        load_detector(converted), golden.pop("input"), CASES[case]["image_sizes_hw"], CASES[case]["captions"]
    )
    count = taps["pred_logits"].shape[-1]  # IDEA pads the logits to 256 tokens
    assert golden["pred_logits"][..., count:].max() == float("-inf")
    golden["pred_logits"] = golden["pred_logits"][..., :count]
    assert taps.keys() == golden.keys()
    for name, found in taps.items():
        assert found.shape == golden[name].shape and (found - golden[name]).abs().max() < TAP_TOLERANCE, name


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


def test_in_a_batch_every_value_is_ideas_own_where_its_code_keeps_samples_apart(converted):
    """Behind these IDEA's text masks mix the samples' captions."""
    golden, case = load_file(FILES / "batch.safetensors"), CASES["batch"]
    _, taps = predict(load_detector(converted), golden["input"], case["image_sizes_hw"], case["captions"])
    valid = text_batch(case["captions"]).valid
    assert not valid.all()
    assert (taps["text_feat"][valid] - golden["text_feat"][valid]).abs().max() < TAP_TOLERANCE
    for name in ("backbone.0", "backbone.1", "backbone.2"):
        assert taps[name].shape == golden[name].shape and (taps[name] - golden[name]).abs().max() < TAP_TOLERANCE, name


@pytest.mark.parametrize("index", [0, 1])
def test_every_value_in_a_batch_is_the_one_of_the_image_alone(converted, index):
    """With the same padding, which the backbone sees in IDEA's code too."""
    golden, case = load_file(FILES / "batch.safetensors"), CASES["batch"]
    model, rows = load_detector(converted), slice(index, index + 1)
    _, together = predict(model, golden["input"], case["image_sizes_hw"], case["captions"])
    _, alone = predict(model, golden["input"][rows], case["image_sizes_hw"][rows], case["captions"][rows])
    assert together.keys() == alone.keys()
    tokens = len(text_batch(case["captions"][rows]).token_ids[0])
    for name, expected in alone.items():
        found = together[name][rows]
        if name in ("text_feat", "memory_text"):
            found = found[:, :tokens]
        if name == "pred_logits":
            found = found[..., :tokens]
        assert found.shape == expected.shape and (found - expected).abs().max() < TAP_TOLERANCE, name


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


def test_a_copy_in_any_format_has_the_same_tensors(converted, tmp_path):
    """IDEA's file, transformers' folder and mmdet's form: one identity, and other weights have another."""

    def digest(path: Path) -> str:
        return json.loads(read_metadata(path)[SOURCE_KEY])["tensors"]

    convert_file(converted, tmp_path / "folder", to="huggingface")
    torch.save({"state_dict": mmdets_form(converted, tmp_path)}, tmp_path / "mmdet.pth")
    for source in ("folder", "mmdet.pth"):
        convert_file(tmp_path / source, tmp_path / "copy.safetensors")
        assert digest(tmp_path / "copy.safetensors") == digest(converted), source
    state = torch.load(tmp_path / "mmdet.pth", weights_only=True)["state_dict"]
    state["level_embed"][0, 0] += 1e-6
    torch.save({"state_dict": state}, tmp_path / "mmdet.pth")
    convert_file(tmp_path / "mmdet.pth", tmp_path / "copy.safetensors")
    assert digest(tmp_path / "copy.safetensors") != digest(converted)


@pytest.mark.slow
def test_ideas_weights_can_be_fine_tuned(tmp_path):
    """The step of a training run on weights whose denoising embedding is fresh."""
    report = convert_file(FILES / "idea_checkpoint.pth", tmp_path / "idea.safetensors")
    assert any("denoising label embedding: fresh, seen in training only" in line for line in report.lines())
    config = TrainConfig(
        load_detector(tmp_path / "idea.safetensors").config,
        DataConfig(root=scenes(tmp_path / "data"), batch_size=2, workers=0, train_sides=(64,), crop_probability=0.0,
                   evaluation=(), evaluation_side=64),
        init_from=FILES / "idea_checkpoint.pth", run_dir=tmp_path / "run", epochs=1, device="cpu", pictures=0,
    )  # fmt: skip
    fit(config)
    before, after = load_file(tmp_path / "idea.safetensors"), load_file(tmp_path / "run/final.safetensors")
    assert before.keys() == after.keys() and all(bool(tensor.isfinite().all()) for tensor in after.values())
    assert not torch.equal(before[LABEL_EMBEDDING], after[LABEL_EMBEDDING])
    losses = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("dn" in key or "denoising" in key for key in losses[0])
    with pytest.raises(ValueError, match="cannot be written as IDEA's"):  # its heads have learned biases now
        convert_file(tmp_path / "run/final.safetensors", tmp_path / "x.pth", to="idea")


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
