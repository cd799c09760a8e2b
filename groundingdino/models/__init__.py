"""`groundingdino.models` of IDEA-Research/GroundingDINO: a model from its config, to be filled with its weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from groundingdino.checkpoints.formats import idea, original_head
from groundingdino.config import swin_b, swin_t
from groundingdino.model import GroundingDINO
from groundingdino.util.utils import Tokenizer, clean_state_dict

BACKBONES = {"swin_T_224_1k": swin_t, "swin_B_384_22k": swin_b, "swin_B_224_22k": swin_b}


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
    """A model with fresh weights of the size that `args.backbone` names. ValueError for another backbone."""
    backbone = getattr(args, "backbone", None)
    if backbone not in BACKBONES:
        raise ValueError(f"backbone {backbone!r} is not one of IDEA's released models: {', '.join(BACKBONES)}")
    return IdeaGroundingDINO(replace(BACKBONES[backbone](), box_eps=original_head.IDEA_EPS))
