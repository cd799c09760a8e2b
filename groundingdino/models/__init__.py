"""`groundingdino.models` of IDEA-Research/GroundingDINO: a model from its config, to be filled with its weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from groundingdino.checkpoints.formats import idea, original_head
from groundingdino.config import ModelConfig, swin_b, swin_t
from groundingdino.model import GroundingDINO
from groundingdino.util.utils import Tokenizer, clean_state_dict

BACKBONES = {"swin_T_224_1k": swin_t, "swin_B_384_22k": swin_b, "swin_B_224_22k": swin_b}
# {theirs: ours}, of the sizes in a config file
SIZES = {
    "hidden_dim": "width",
    "nheads": "num_heads",
    "num_feature_levels": "num_levels",
    "enc_n_points": "num_points",
    "dec_n_points": "num_points",
    "dim_feedforward": "ffn_width",
    "enc_layers": "enhancer_layers",
    "dec_layers": "decoder_layers",
    "num_queries": "num_queries",
}


def contradictions(args: Any, config: ModelConfig) -> list[str]:
    """What a config file of IDEA's says that is not so of a model: one entry for each size, and for the backbone."""
    stated = {theirs: getattr(args, theirs, None) for theirs in SIZES}
    found = {theirs: getattr(config, ours) for theirs, ours in SIZES.items()}
    wrong = [
        f"{name} is {found[name]}, not {value}" for name, value in stated.items() if value not in (None, found[name])
    ]
    backbone = getattr(args, "backbone", None)
    if backbone is not None:
        width = _preset(backbone).backbone.embed_dim
        if width != config.backbone.embed_dim:
            wrong.append(f"the backbone has a width of {config.backbone.embed_dim}, {backbone} one of {width}")
    return wrong


class IdeaGroundingDINO(GroundingDINO):
    """Our detector, which also takes a state dict in IDEA's naming."""

    tokenizer = Tokenizer()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load IDEA's weights, or ours. A name that is missing or unknown is an error, also where `strict` is off."""
        plain = clean_state_dict(state_dict)
        if "transformer.level_embed" not in plain:
            return super().load_state_dict(state_dict, strict, assign)
        native = original_head.from_original(idea.to_native(plain))
        native.setdefault(original_head.LABEL_EMBEDDING, self.denoising.label_embedding.weight.detach())
        return super().load_state_dict(native, True, assign)


def build_model(args: Any) -> IdeaGroundingDINO:
    """A model with fresh weights of the size that `args.backbone` names.

    ValueError for a backbone that none of IDEA's released models has, or for sizes that this one has not.
    """
    config = replace(_preset(getattr(args, "backbone", None)), box_eps=original_head.IDEA_EPS)
    wrong = contradictions(args, config)
    if wrong:
        raise ValueError(f"not one of IDEA's released models: {'; '.join(wrong)}")
    return IdeaGroundingDINO(config)


def _preset(backbone: Any) -> ModelConfig:
    if backbone not in BACKBONES:
        raise ValueError(f"backbone {backbone!r} is not one of IDEA's released models: {', '.join(BACKBONES)}")
    return BACKBONES[backbone]()
