"""The golden cases of `golden/tiny` as our records: the model, its batches, and the denoising draws mmdet made."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from groundingdino import boxes as box_ops
from groundingdino.checkpoints.formats.mmdet import to_native
from groundingdino.config import BackboneConfig, ModelConfig, TextConfig
from groundingdino.inputs.text import CaptionTokenizer, category_prompt, collate_text, finish_caption, positive_map
from groundingdino.model import DenoisingNoise, GroundingDINO, build_detector
from groundingdino.model.denoising import LABEL_NOISE, num_groups
from groundingdino.structures import ImageBatch, Targets, TextBatch

TINY_FILES = Path(__file__).parent / "golden" / "tiny"
DECODER_LAYERS = 2
TINY = ModelConfig(
    name="tiny",
    backbone=BackboneConfig(16, (2, 2, 2, 2), (1, 2, 4, 8), 12, drop_path_rate=0.0),
    text=TextConfig(32, 2, 2, 64),
    ffn_width=128,
    text_layer_ffn_width=64,
    fusion_width=64,
    fusion_dropout=0.0,
    enhancer_layers=2,
    decoder_layers=DECODER_LAYERS,
    num_queries=60,
    num_denoising=20,
)


@cache
def tokenizer() -> CaptionTokenizer:
    """One tokenizer for all tests."""
    return CaptionTokenizer()


@cache
def _tiny_weights() -> dict[str, Tensor]:
    checkpoint = torch.load(TINY_FILES / "mmdet_checkpoint.pth", map_location="cpu", weights_only=True)
    return to_native(checkpoint["state_dict"])


def tiny_model() -> GroundingDINO:
    """The golden checkpoint in our model, evaluation mode."""
    model = build_detector(TINY)
    model.load_state_dict(_tiny_weights())
    return model.eval()


def image_batch(pixels: Tensor, sizes: list[list[int]]) -> ImageBatch:
    """Pixels that are normalised and padded already."""
    valid = torch.zeros(len(pixels), *pixels.shape[2:], dtype=torch.bool)
    for row, (height, width) in zip(valid, sizes, strict=True):
        row[:height, :width] = True
    return ImageBatch(pixels, valid, padded=any(size != list(pixels.shape[2:]) for size in sizes))


def text_batch(captions: list[str]) -> TextBatch:
    """Captions that end as they should."""
    return collate_text([tokenizer().encode(caption) for caption in captions])


def caption_of(prompt: dict[str, Any]) -> str:
    """A prompt of `infer.json` as mmdet writes it."""
    if prompt.get("custom_entities"):
        return category_prompt(prompt["text"].split(". ")).caption
    return finish_caption(prompt["text"])


def load_case(kind: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """kind "infer" or "train": the description and the tensors of a case."""
    tensors = f"{kind}_{name}.safetensors" if name != "trajectory" else "trajectory.safetensors"
    return json.loads((TINY_FILES / f"{kind}.json").read_text())[name], load_file(TINY_FILES / tensors)


def training_batch(case: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[ImageBatch, TextBatch, Targets]:
    """A training case as the loader would give it."""
    encoded = [tokenizer().encode(caption) for caption in case["captions"]]
    text = collate_text(encoded)
    counts = tuple(len(boxes) for boxes in case["boxes"])
    batch, objects, tokens = len(counts), max(*counts, 1), text.token_ids.shape[1]
    boxes, labels = torch.zeros(batch, objects, 4), torch.zeros(batch, objects, dtype=torch.int64)
    named, valid = torch.zeros(batch, objects, tokens, dtype=torch.bool), torch.zeros(batch, objects, dtype=torch.bool)
    for i, count in enumerate(counts):
        if count:
            height, width = case["sizes"][i]
            corners = torch.tensor(case["boxes"][i]) / torch.tensor([width, height, width, height])
            boxes[i, :count] = box_ops.xyxy_to_cxcywh(corners)
            labels[i, :count] = torch.tensor(case["labels"][i])
            spans = [case["tokens_positive"][i][str(label)] for label in case["labels"][i]]
            named[i, :count] = positive_map(encoded[i], spans, tokens)
            valid[i, :count] = True
    targets = Targets(boxes, named, labels, valid, counts)
    return image_batch(tensors["input"], case["sizes"]), text, targets


def recorded_noise(tensors: dict[str, Tensor], targets: Targets, prefix: str = "") -> DenoisingNoise:
    """What mmdet drew, (2 G * all objects) in a row, brought into our (B, G, 2, N)."""
    groups, (batch, objects) = num_groups(targets.counts, TINY.num_denoising), targets.labels.shape
    places = [(image, i) for image, count in enumerate(targets.counts) for i in range(count)]

    def spread(flat: Tensor) -> Tensor:
        rows = flat.unflatten(0, (groups, 2, len(places)))
        out = torch.ones(batch, groups, 2, objects, *flat.shape[1:], dtype=flat.dtype)
        for at, (image, i) in enumerate(places):
            out[image, :, :, i] = rows[:, :, at]
        return out

    label_draw = tensors[f"{prefix}dn.label_p"]
    label_random = torch.zeros(len(label_draw), dtype=torch.int64)
    label_random[label_draw < LABEL_NOISE] = tensors[f"{prefix}dn.label_new"]
    return DenoisingNoise(
        label_draw=spread(label_draw),
        label_random=spread(label_random).clamp(max=TINY.num_labels - 1),
        box_sign=spread(tensors[f"{prefix}dn.box_sign"] * 2 - 1),
        box_draw=spread(tensors[f"{prefix}dn.box_part"]),
    )
