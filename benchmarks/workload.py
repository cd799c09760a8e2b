"""What is measured: random weights of a real size in both formats, images of noise, sentences, targets."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.random_checkpoint import random_model
from groundingdino.checkpoints.convert import convert_file
from groundingdino.checkpoints.model_file import save_detector
from groundingdino.config import MODEL_PRESETS, quickstart_model
from groundingdino.inputs import text
from groundingdino.inputs.images import collate_images

SENTENCES = (
    "the man in the red shirt on the left",
    "second zebra from right",
    "cup",
    "woman holding an umbrella",
    "left most chair that is not occupied",
    "guy in blue",
    "the small dog lying in front of the couch",
    "white bus in the back",
)
CONFIGS = MODEL_PRESETS | {
    # transformers ties this width to half of the image layers': 128 instead of 256.
    "quickstart": lambda: replace(quickstart_model(), text_layer_ffn_width=128),
}
BORDER_BIAS = 0.05  # little beside a feature, much beside nothing
BOX_STEP = 0.5  # of what a random box head would move a box


def sentences(count: int) -> list[str]:
    """So many, over and over."""
    return [SENTENCES[n % len(SENTENCES)] for n in range(count)]


def sentence_of(tokens: int) -> str:
    """A sentence of so many tokens, [CLS], full stop and [SEP] included; at least 4."""
    return " ".join(["cat"] * (tokens - 3))


def write_models(folder: Path, size: str, with_transformers: bool = True) -> None:
    """The same random weights as `ours.safetensors` and, for transformers, in the folder `theirs`.

    All queries have the same content. A query's rank picks its content, and random weights rank many proposals almost
    equally: where rounding swaps two of them, different contents would give different boxes.

    Boxes stay inside the image, as those of trained weights do: box heads move them less, and proposals at the edge,
    whose features are masked with 0 and whose boxes are 1 in all coordinates, score below all others, since what they
    keep, the bias, points away from every word. A coordinate beyond 0.999 would differ: between decoder layers mmdet
    and we keep boxes 1e-3 from the edge (`inverse_sigmoid` in `layers/transformer/dino_layers.py`), transformers 1e-5
    (`torch.special.logit` in `MMGroundingDinoDecoder.forward`).

    The final logits have no bias, so that scores fill more of [0, 1] than its lowest hundredth.
    """
    model = random_model(CONFIGS[size]())
    with torch.no_grad():
        model.query_embedding.weight.copy_(model.query_embedding.weight[:1].expand_as(model.query_embedding.weight))
        words = torch.tensor([1.0, -1.0]).repeat(model.config.width // 2)
        model.get_parameter(
            f"feature_enhancer.layers.{model.config.enhancer_layers - 1}.text_layer.ffn_norm.bias"
        ).copy_(words)
        model.query_selection.fc.bias.copy_(-BORDER_BIAS * words)
        model.query_selection.norm.bias.zero_()
        for contrastive_head in model.decoder.contrastive_heads:
            contrastive_head.get_parameter("bias").zero_()
        for head in (model.query_selection.box_head, *model.decoder.box_heads):
            head.fc3.weight.mul_(BOX_STEP)
            head.fc3.bias.mul_(BOX_STEP)
    save_detector(folder / "ours.safetensors", model)
    if with_transformers:
        convert_file(folder / "ours.safetensors", folder / "theirs", to="huggingface")


def photograph(height: int, width: int) -> Tensor:
    """(3, H, W) uint8: smooth noise, so that places differ."""
    coarse = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    return (smooth * 60 + 128).clamp(0, 255).to(torch.uint8)


def write_inputs(path: Path, captions: list[str], height: int, width: int) -> Path:
    """One image for each caption, the same in all; one object in each, which the caption's words name."""
    encoded = [text.default_tokenizer().encode(text.finish_caption(caption)) for caption in captions]
    words = text.collate_text(encoded)
    tokens = words.token_ids.shape[1]
    named = torch.stack([
        text.positive_map(e, [[[0, len(caption)]]], tokens) for e, caption in zip(encoded, captions, strict=True)
    ])  # fmt: skip
    image = photograph(height, width)
    tensors = {
        "photograph": image,
        "pixels": collate_images([image] * len(captions)).pixels,
        "boxes": torch.tensor([0.4, 0.5, 0.3, 0.2]).repeat(len(captions), 1, 1),
        "labels": torch.zeros(len(captions), 1, dtype=torch.int64),
        "positive_map": named,
        **{name: getattr(words, name) for name in ("token_ids", "position_ids", "attends", "valid")},
    }
    save_file(tensors, path)
    return path
