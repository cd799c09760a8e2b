"""The model against mmdet's taps, and what must not change."""

import pytest
import torch
from golden_cases import TINY, caption_of, image_batch, load_case, text_batch, tiny_model, tokenizer
from torch import Tensor

from groundingdino.config import swin_b, swin_l, swin_t
from groundingdino.inference import postprocess
from groundingdino.inputs.images import ImageGeometry
from groundingdino.inputs.text import category_prompt, positive_map
from groundingdino.model import build_detector
from groundingdino.structures import ImageBatch

# float32, other order of sums than mmdet's: measured 5e-6 at most, on values up to about 5.
TOLERANCE = 1e-5
INVARIANCE = 1e-5  # the same sums in other shapes of matrix products
INFER_CASES = (
    "rec_single",
    "categories_single",
    "spans_single",
    "categories_batch_padded",
    "rec_batch_mixed_captions",
)


@pytest.fixture(autouse=True)
def _same_pixels_every_time():
    torch.manual_seed(0)  # with others, two proposals may tie to the last bits of a float, and change ranks


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def taps(model):
    """What the parts of the model answered, by name, filled by a forward pass."""
    answers = {}
    parts = ("backbone", "neck", "text_encoder", "feature_enhancer")

    def keep(name):
        return lambda module, inputs, output: answers.__setitem__(name, output)

    handles = [getattr(model, name).register_forward_hook(keep(name)) for name in parts]
    yield answers
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", INFER_CASES)
@pytest.mark.usefixtures("each_path")
@torch.no_grad()
def test_every_tap_from_backbone_to_boxes_equals_mmdet(name, model, taps):
    case, golden = load_case("infer", name)
    text = text_batch([caption_of(prompt) for prompt in case["prompts"]])
    output = model(image_batch(golden["input"], case["image_sizes_hw"]), text)
    for part in ("backbone", "neck"):
        for level, answer in enumerate(taps[part]):
            assert largest_difference(answer, golden[f"{part}.{level}"]) < TOLERANCE
    assert largest_difference(taps["text_encoder"], golden["text_feat"]) < TOLERANCE
    memory, text_memory = (stream.tokens for stream in taps["feature_enhancer"])
    # What stands at padded places is nobody's input; mmdet's and ours differ there.
    real = golden.get("memory_padding_mask", torch.zeros(memory.shape[:2])) == 0
    assert largest_difference(memory[real], golden["memory"][real]) < TOLERANCE
    assert largest_difference(text_memory[text.valid], golden["memory_text"][text.valid]) < TOLERANCE
    assert largest_difference(output.proposals.boxes, golden["topk_boxes"]) < TOLERANCE
    for layer, prediction in enumerate(output.layers):
        assert largest_difference(prediction.boxes, golden["pred_boxes"][layer]) < TOLERANCE
        theirs = golden["pred_logits"][layer]
        tokens = prediction.logits.shape[-1]
        assert theirs[..., tokens:].eq(float("-inf")).all()
        assert torch.equal(prediction.logits.isfinite(), theirs[..., :tokens].isfinite())
        real = prediction.logits.isfinite()
        assert largest_difference(prediction.logits[real], theirs[..., :tokens][real]) < TOLERANCE


def spans_of(prompt):
    if prompt.get("custom_entities"):
        return category_prompt(prompt["text"].split(". ")).spans
    return prompt["tokens_positive"]


@pytest.mark.parametrize("name", INFER_CASES)
@torch.no_grad()
def test_boxes_scores_and_labels_equal_mmdets_results(name, model):
    case, golden = load_case("infer", name)
    captions = [caption_of(prompt) for prompt in case["prompts"]]
    output = model(image_batch(golden["input"], case["image_sizes_hw"]), text_batch(captions)).layers[-1]
    for i, (prompt, caption) in enumerate(zip(case["prompts"], captions, strict=True)):
        logits = output.logits[i]
        if prompt.get("tokens_positive") == -1:
            scores = postprocess.referring_scores(logits)
        else:
            named = positive_map(tokenizer().encode(caption), spans_of(prompt), logits.shape[-1])
            scores = postprocess.category_scores(logits, named)
        boxes, scores, labels = postprocess.top_detections(scores, output.boxes[i], 30)
        geometry = ImageGeometry(tuple(case["image_sizes_hw"][i]), tuple(case["scale_factors_wh"][i]))
        boxes = postprocess.to_image_frame(boxes, geometry)
        theirs = {key: golden[f"result.{i}.{key}"] for key in ("boxes", "scores", "labels")}
        assert largest_difference(scores, theirs["scores"]) < 1e-5
        # Entries whose scores differ by less than 1e-5 may swap places: every one of ours is among theirs.
        same = (
            ((boxes[:, None] - theirs["boxes"]).abs().amax(dim=-1) < 1e-3)  # pixels
            & (labels[:, None] == theirs["labels"])
            & ((scores[:, None] - theirs["scores"]).abs() < 1e-5)
        )
        assert same.any(dim=1).all() and same.any(dim=0).all()
        clear = torch.ones(30, dtype=torch.bool)
        clear[1:] &= theirs["scores"].diff().abs() > 1e-5
        clear[:-1] &= theirs["scores"].diff().abs() > 1e-5
        assert torch.equal(labels[clear], theirs["labels"][clear])


@torch.no_grad()
def test_an_image_does_not_feel_its_neighbours_caption(model):
    pixels = torch.randn(2, 3, 96, 128)
    images = image_batch(pixels, [[96, 128], [96, 128]])
    answers = [
        model(images, text_batch(["second zebra from right. ", other])).layers[-1]
        for other in ("dog. ", "a very long sentence about nothing at all. cat. dog. ")
    ]
    tokens = 7
    alone = model(image_batch(pixels[:1], [[96, 128]]), text_batch(["second zebra from right. "])).layers[-1]
    for answer in answers:
        assert largest_difference(answer.logits[0, :, :tokens], alone.logits[0]) < INVARIANCE
        assert largest_difference(answer.boxes[0], alone.boxes[0]) < INVARIANCE
        assert answer.logits[0, :, tokens:].eq(float("-inf")).all()


@torch.no_grad()
def test_the_order_of_a_batch_does_not_matter(model):
    pixels, sizes = torch.randn(2, 3, 96, 128), [[96, 100], [64, 128]]
    captions = ["cat. dog. ", "the red bus on the left. "]
    forward = model(image_batch(pixels, sizes), text_batch(captions)).layers[-1]
    backward = model(image_batch(pixels.flip(0), sizes[::-1]), text_batch(captions[::-1])).layers[-1]
    assert largest_difference(forward.boxes, backward.boxes.flip(0)) < INVARIANCE


@torch.no_grad()
def test_what_lies_in_the_padding_does_not_matter_beyond_the_backbone(model):
    sizes = [[96, 64], [96, 128]]
    images, text = image_batch(torch.randn(2, 3, 96, 128), sizes), text_batch(["cat. ", "dog. "])
    image = model.encode_image(images)
    assert image.valid is not None and not image.valid.all()
    spoiled = image.tokens.masked_fill(~image.valid[..., None], 7.0)
    other = type(image)(**{**vars(image), "tokens": spoiled})
    text_tokens = model.encode_text(text)
    ours, theirs = (model.detect(x, text_tokens, text).layers[-1] for x in (image, other))
    assert largest_difference(ours.boxes, theirs.boxes) == 0


@torch.no_grad()
def test_one_image_half_serves_many_sentences(model):
    images = image_batch(torch.randn(1, 3, 96, 128), [[96, 128]])
    captions = ["cat. ", "the dog on the left. ", "a bus. "]
    text = text_batch(captions)
    shared = model.detect(model.encode_image(images).take([0, 0, 0]), model.encode_text(text), text).layers[-1]
    for i, caption in enumerate(captions):
        alone = model(images, text_batch([caption])).layers[-1]
        assert largest_difference(shared.boxes[i], alone.boxes[0]) < INVARIANCE


@torch.no_grad()
def test_an_image_smaller_than_the_queries_need_gives_fewer_detections(model):
    images = image_batch(torch.randn(1, 3, 20, 20), [[20, 20]])  # 3x3 + 2x2 + 1 + 1 = 15 tokens
    prediction = model(images, text_batch(["cat. "])).layers[-1]
    assert prediction.boxes.shape == (1, 15, 4) and prediction.boxes.isfinite().all()


@pytest.mark.parametrize(("preset", "millions"), [(swin_t, 173.0), (swin_b, 233.0), (swin_l, 343.1)])
def test_presets_have_the_released_sizes(preset, millions):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_detector(preset()).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("sizes", [[[96, 128]], [[96, 100], [64, 128]]], ids=["one image", "padded batch"])
def test_the_fused_window_attention_of_inference_equals_the_one_with_gradients(model, sizes):
    pixels = torch.randn(len(sizes), 3, 96, 128)
    with_gradients = model.backbone(pixels)
    with torch.no_grad():
        fused = model.backbone(pixels)
    for ours, theirs in zip(fused, with_gradients, strict=True):
        assert theirs.requires_grad and largest_difference(ours, theirs) < TOLERANCE


@torch.no_grad()
def test_half_precision_weights_give_nearly_the_same_scores(model):
    case, golden = load_case("infer", "rec_single")
    text = text_batch([caption_of(case["prompts"][0])])
    images = image_batch(golden["input"], case["image_sizes_hw"])
    exact = postprocess.referring_scores(model(images, text).layers[-1].logits).amax()
    for dtype in (torch.bfloat16, torch.float16):
        half = tiny_model().to(dtype)
        output = half(ImageBatch(images.pixels.to(dtype), images.valid, images.padded), text).layers[-1]
        assert output.logits[output.logits.isfinite()].dtype == torch.float32
        assert postprocess.referring_scores(output.logits).amax().item() == pytest.approx(exact.item(), abs=0.02)


def test_the_config_knows_every_number_of_the_golden_model():
    assert sum(p.numel() for p in build_detector(TINY).parameters()) == sum(
        p.numel() for p in tiny_model().parameters()
    )
