"""MM-Grounding-DINO from pixels and tokens to boxes. `GroundingDINO.forward` is the paper's figure 3, top to bottom.

Axes: B images, H/W pixels, L levels, S image tokens, T text tokens, Q queries, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from groundingdino.config import ModelConfig
from groundingdino.model.backbone import SwinBackbone
from groundingdino.model.decoder import Decoder
from groundingdino.model.denoising import (
    Denoising,
    DenoisingNoise,
    DenoisingOutput,
    draw_noise,
    self_attention_mask,
    split_queries,
)
from groundingdino.model.feature_enhancer import FeatureEnhancer
from groundingdino.model.image_tokens import ImageTokens, flatten_levels
from groundingdino.model.neck import Neck
from groundingdino.model.query_selection import QuerySelection
from groundingdino.model.text_encoder import TextEncoder, text_context
from groundingdino.structures import ImageBatch, Prediction, Targets, TextBatch


@dataclass(frozen=True)
class DetectorOutput:
    """Every answer that a loss may look at; `layers[-1]` is the detector's."""

    layers: tuple[Prediction, ...]  # one a decoder layer
    proposals: Prediction  # the encoder's, that became the decoder's first references
    denoising: DenoisingOutput | None  # in training only


class GroundingDINO(nn.Module):
    """The detector. `forward` runs it whole; the halves are separate calls, so that one image can be asked many
    sentences and one prompt can serve many images without computing either half twice."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = SwinBackbone(config.backbone)
        self.neck = Neck(self.backbone.channels, config.width, config.num_levels)
        self.level_embedding = nn.Parameter(torch.randn(config.num_levels, config.width))
        self.text_encoder = TextEncoder(config.text, config.width)
        self.feature_enhancer = FeatureEnhancer(config)
        self.query_selection = QuerySelection(config.width, config.num_queries, config.learned_scale)
        self.query_embedding = nn.Embedding(config.num_queries, config.width)
        self.denoising = Denoising(config.width, config.num_labels)
        self.decoder = Decoder(config)

    def encode_image(self, images: ImageBatch) -> ImageTokens:
        """The image half: everything that does not need the text."""
        levels = self.neck(self.backbone(images.pixels))
        return flatten_levels(levels, self.level_embedding, images)

    def encode_text(self, text: TextBatch) -> Tensor:
        """The text half: (B, T, D)."""
        return self.text_encoder(text)

    def detect(
        self,
        image: ImageTokens,
        text_tokens: Tensor,
        text: TextBatch,
        targets: Targets | None = None,
        noise: DenoisingNoise | None = None,
    ) -> DetectorOutput:
        """The predictions for what the two halves gave.

        With `targets` the denoising queries are decoded too; `noise` replaces their random draws.
        """
        # Image and text attend to each other
        image, context = self.feature_enhancer(image, text_context(text_tokens, text))

        # The best image tokens become the first reference boxes
        selection = self.query_selection(image, context)
        boxes = selection.boxes  # (B, Q, 4)
        number = torch.arange(boxes.shape[1], device=boxes.device)
        query = self.query_embedding(number).expand(len(boxes), -1, -1)  # (B, Q, D)

        # In training, denoising queries go in front
        extra, attends = None, None
        if targets is not None:
            noise = noise or draw_noise(targets, self.config.num_denoising, self.config.num_labels)
            extra = self.denoising(targets, noise)
            attends = self_attention_mask(extra.boxes.shape[1], extra.group_size, boxes.shape[1], boxes.device)
            query = torch.cat((extra.content.to(query.dtype), query), dim=1)
            boxes = torch.cat((extra.boxes, boxes), dim=1)

        # Boxes and logits, layer by layer
        layers = self.decoder(query, boxes, attends, image, context)
        if extra is None:
            return DetectorOutput(layers, selection.proposals, None)
        denoising, matching = split_queries(layers, extra)
        return DetectorOutput(matching, selection.proposals, denoising)

    def forward(
        self, images: ImageBatch, text: TextBatch, targets: Targets | None = None, noise: DenoisingNoise | None = None
    ) -> DetectorOutput:
        """Images and captions, one caption an image, to predictions. See `detect` for `targets` and `noise`."""
        return self.detect(self.encode_image(images), self.encode_text(text), text, targets, noise)

    def set_activation_checkpointing(self, on: bool) -> None:
        """Recompute in the backward pass: less memory, more time (measured in docs/performance.md).

        Recomputed are the enhancer's layers, the backbone's MLPs, and its attention in the first two stages: in the
        later ones a kept byte saves several times as many FLOPs (`SwinStage`).
        """
        self.backbone.recompute = on
        self.feature_enhancer.recompute = on


def build_detector(config: ModelConfig) -> GroundingDINO:
    """A detector with fresh weights. The only reader of `ModelConfig`."""
    return GroundingDINO(config)
