"""The head of the original Grounding DINO as a special case of MM-Grounding-DINO's.

The original scores a query with a token by their plain dot product. MM-Grounding-DINO divides by the square root of the
width D and adds a bias. Its decoder has a box head per layer, the original one for all.
So an original model is ours with biases of zero, equal box heads, and text features that leave the last text layer
sqrt(D) times as large; the decoder's attention to the text, which reads the same features, takes the factor back in its
keys and values. At D = 256 the factor is 16: a change of exponents, and bit-exact.

mmdet's COCO fine-tunes of the original (`log_scale` in each head) multiply that dot product by the exponential of a
learned number. Theirs and ours differ by the same factor, and have box heads per layer as MM-Grounding-DINO.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from groundingdino.config import ModelConfig

BIAS = re.compile(r"(decoder\.contrastive_heads\.\d+|query_selection\.contrastive_head)\.bias")
BOX_HEAD = re.compile(r"decoder\.box_heads\.(\d+)\.(.*)")
TEXT_KEYS_AND_VALUES = re.compile(r"decoder\.layers\.\d+\.text_attention\.in_proj_weight")
LAYER = re.compile(r"(feature_enhancer|decoder)\.layers\.(\d+)\.")
LABEL_EMBEDDING = "denoising.label_embedding.weight"
IDEA_EPS = 1e-3  # of the inverse sigmoid in IDEA's box head; mmdet has 1e-5


def from_original(native: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole head for weights that have all but it: scaled text features, biases of zero, a box head per layer.

    A decoder layer whose box head is not in `native` gets a copy of the first layer's. Biases that are there stay.
    """
    tensors = _scaled_text(native, math.sqrt(_width(native)))
    first = {m[2]: native[name] for name in native if (m := BOX_HEAD.fullmatch(name)) and m[1] == "0"}
    for layer in range(_count(native, "decoder")):
        for part, tensor in first.items():
            tensors.setdefault(f"decoder.box_heads.{layer}.{part}", tensor.clone())
        tensors.setdefault(f"decoder.contrastive_heads.{layer}.bias", torch.zeros(1))
    tensors.setdefault("query_selection.contrastive_head.bias", torch.zeros(1))
    return tensors


def to_original(native: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_original`, with the box head under the number of every layer.

    Raises:
        ValueError: a bias that is not zero, or box heads that differ: another head, which the original cannot express.
    """
    for name, tensor in native.items():
        if BIAS.fullmatch(name) and bool(tensor.any()):
            raise ValueError(
                f"the original head has no bias, {name!r} is {tensor.item():.3g}: weights of MM-Grounding-DINO cannot "
                "be written as IDEA's"
            )
        box_head = BOX_HEAD.fullmatch(name)
        if box_head and not torch.equal(tensor, native[f"decoder.box_heads.0.{box_head[2]}"]):
            raise ValueError(
                f"the original has one box head for all decoder layers, {name!r} differs from the first layer's: "
                "cannot be written as IDEA's"
            )
    return unscaled(native)


def unscaled(native: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with text features as the original has them, and without the biases that are zero."""
    kept = {name: tensor for name, tensor in native.items() if not BIAS.fullmatch(name) or bool(tensor.any())}
    return _scaled_text(kept, 1 / math.sqrt(_width(native)))


def has_original_head(native: Mapping[str, Tensor]) -> bool:
    """Whether `to_original` would write it."""
    try:
        to_original(native)
    except ValueError:
        return False
    return True


def is_original(config: ModelConfig) -> bool:
    """Whether a config is that of weights that came from IDEA."""
    return config.box_eps == IDEA_EPS


def _scaled_text(native: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    last = f"feature_enhancer.layers.{_count(native, 'feature_enhancer') - 1}.text_layer.ffn_norm."
    tensors = {name: tensor * factor if name.startswith(last) else tensor for name, tensor in native.items()}
    for name in filter(TEXT_KEYS_AND_VALUES.fullmatch, native):
        query, key, value = native[name].chunk(3)
        tensors[name] = torch.cat((query, key / factor, value / factor))
    return tensors


def _count(native: Mapping[str, Tensor], part: str) -> int:
    return 1 + max((int(m[2]) for name in native if (m := LAYER.match(name)) and m[1] == part), default=-1)


def _width(native: Mapping[str, Tensor]) -> int:
    if "level_embedding" not in native:
        raise ValueError("the model's width cannot be told: no level embedding")
    return native["level_embedding"].shape[-1]
