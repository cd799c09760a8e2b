"""Language-guided query selection (Grounding DINO section 3.3; mmdet `detectors/grounding_dino.py::pre_decoder`).

Axes: B images, S image tokens, T text tokens, Q queries, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from groundingdino.model.heads import BoxHead, ContrastiveHead
from groundingdino.model.image_tokens import ImageTokens
from groundingdino.model.text_encoder import TextContext
from groundingdino.ops import Linear
from groundingdino.structures import Prediction

ANCHOR_SIZE = 0.05  # of the image, on the finest level; doubles from level to level
INSIDE = (0.01, 0.99)  # anchors that leave this range in any coordinate are never proposed


@dataclass(frozen=True)
class Selection:
    """The chosen image tokens as first boxes."""

    boxes: Tensor  # (B, Q, 4) reference boxes, cxcywh in [0, 1], cut off from the graph
    proposals: Prediction  # the same with gradients, for the encoder's loss


def anchors(image: ImageTokens) -> tuple[Tensor, Tensor]:
    """A box at every image token.

    Returns:
        Box logits (B, S, 4), +inf where the anchor may not be proposed, and (B, S) bool, True = may be proposed.
    """
    sizes = [ANCHOR_SIZE * 2.0**level for level in range(len(image.shapes))]
    size = torch.cat([
        image.grid.new_full((height * width, 2), s)
        for s, (height, width) in zip(sizes, image.shapes, strict=True)
    ])  # fmt: skip
    boxes = torch.cat((image.grid, size.expand_as(image.grid)), dim=-1)
    usable = ((boxes > INSIDE[0]) & (boxes < INSIDE[1])).all(dim=-1)
    if image.valid is not None:
        usable = usable & image.valid
    logits = torch.log(boxes / (1 - boxes)).masked_fill(~usable[..., None], float("inf"))
    return logits, usable


def without_autocast_cache(device_type: str) -> torch.autocast:
    """Autocast as it is, but keeping no half-precision copy of a weight.

    A copy that is made without gradient would otherwise be used again where the gradient is needed.
    """
    dtype, enabled = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, dtype, enabled, cache_enabled=False)


class QuerySelection(nn.Module):
    """Every image token proposes a box; the Q that match some text token best become the decoder's references."""

    def __init__(self, width: int, num_queries: int, learned_scale: bool = False) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.fc = Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.contrastive_head = ContrastiveHead(learned_scale)
        self.box_head = BoxHead(width)
        nn.init.xavier_uniform_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, image: ImageTokens, text: TextContext) -> Selection:
        """The Q best tokens of each image as boxes; all tokens where they are fewer."""
        # A proposal at every token, for the ranking only: ranks carry no gradient.
        anchor_logits, usable = anchors(image)
        tokens = image.tokens.masked_fill(~usable[..., None], 0.0)
        with torch.no_grad(), without_autocast_cache(tokens.device.type):
            logits = self.contrastive_head(self.norm(self.fc(tokens)), text)
            best = logits.amax(dim=-1).topk(min(self.num_queries, tokens.shape[1]), dim=1).indices[..., None]

        # The chosen ones again, with gradient
        chosen = self.norm(self.fc(tokens.gather(1, best.expand(-1, -1, tokens.shape[-1]))))
        logits = self.contrastive_head(chosen, text)
        boxes = (self.box_head(chosen) + anchor_logits.gather(1, best.expand(-1, -1, 4))).sigmoid()
        return Selection(boxes.detach(), Prediction(logits, boxes))
