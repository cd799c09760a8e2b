"""MM-Grounding-DINO from pixels and tokens to boxes. `GroundingDINO.forward` is the paper's figure 3, top to bottom.

Axes: B images, H/W pixels, L levels, S image tokens, T text tokens, Q queries, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
)
from groundingdino.model.feature_enhancer import FeatureEnhancer, ImageTokens
from groundingdino.model.neck import Neck
from groundingdino.model.positions import image_position_encoding
from groundingdino.model.query_selection import QuerySelection
from groundingdino.model.text_encoder import TextEncoder
from groundingdino.structures import ImageBatch, Prediction, Targets, TextBatch


@dataclass(frozen=True)
class DetectorOutput:
    """Every answer that a loss may look at; `layers[-1]` is the detector's."""

    layers: tuple[Prediction, ...]  # one a decoder layer
    proposals: Prediction  # the encoder's, that became the decoder's first references
    denoising: DenoisingOutput | None  # in training only


def flatten_levels(levels: list[Tensor], level_embedding: Tensor, images: ImageBatch) -> ImageTokens:
    """L maps (B, D, H_l, W_l) -> one row of tokens an image, with positions and the padding worked out."""
    shapes = tuple((int(x.shape[2]), int(x.shape[3])) for x in levels)
    padded = any(size != images.pixels.shape[2:] for size in images.sizes)
    rows, columns = images.valid[:, None, :, 0].float(), images.valid[:, None, 0, :].float()  # (B, 1, H), (B, 1, W)
    valid, position, grid, ratios, sizes = [], [], [], [], []
    for level, (height, width) in enumerate(shapes):
        row = F.interpolate(rows, size=height)[:, 0]  # (B, H_l) nearest, as mmdet `pre_transformer`
        column = F.interpolate(columns, size=width)[:, 0]
        real_height, real_width = row.sum(dim=1), column.sum(dim=1)
        y = (torch.arange(height, device=row.device) + 0.5)[None] / real_height[:, None]  # (B, H_l)
        x = (torch.arange(width, device=row.device) + 0.5)[None] / real_width[:, None]
        grid.append(torch.stack((x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), -1))
        ratios.append(torch.stack((real_width / width, real_height / height), dim=-1))
        sizes.append(torch.stack((torch.full_like(x[0, 0], width), torch.full_like(x[0, 0], height))))
        encoded = image_position_encoding(row, column, levels[level].shape[1])
        position.append(encoded.to(level_embedding.dtype) + level_embedding[level])
        if padded:
            valid.append((row[:, :, None] * column[:, None, :]).flatten(1))
    return ImageTokens(
        tokens=torch.cat([x.flatten(2).mT for x in levels], dim=1),
        position=torch.cat(position, dim=1),
        valid=torch.cat(valid, dim=1) > 0.5 if padded else None,
        valid_ratios=torch.stack(ratios, dim=1),
        grid=torch.cat([g.flatten(1, 2) for g in grid], dim=1),
        level_sizes=torch.stack(sizes),
        shapes=shapes,
    )


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
        self.query_selection = QuerySelection(config.width, config.num_queries)
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
        self, image: ImageTokens, text_tokens: Tensor, text: TextBatch,
        targets: Targets | None = None, noise: DenoisingNoise | None = None,
    ) -> DetectorOutput:  # fmt: skip
        """The rest, on what the halves gave. With `targets` the denoising queries are decoded too; `noise` replaces
        their random draws."""
        memory, text_memory = self.feature_enhancer(image, text_tokens, text)
        selection = self.query_selection(memory, image, text_memory, text.valid)
        boxes = selection.boxes  # (B, Q, 4)
        query = self.query_embedding.weight[: boxes.shape[1]].expand(len(boxes), -1, -1)  # (B, Q, D)
        if targets is None:
            layers = self.decoder(query, boxes, None, memory, image, text_memory, text.valid)
            return DetectorOutput(layers, selection.proposals, None)

        noise = noise or draw_noise(targets, self.config.num_denoising, self.config.num_labels)
        extra = self.denoising(targets, noise)
        count = extra.boxes.shape[1]
        attends = self_attention_mask(count, extra.group_size, boxes.shape[1], boxes.device)
        query = torch.cat((extra.content.to(query.dtype), query), dim=1)
        boxes = torch.cat((extra.boxes, boxes), dim=1)
        answers = self.decoder(query, boxes, attends, memory, image, text_memory, text.valid)
        return DetectorOutput(
            layers=tuple(Prediction(a.logits[:, count:], a.boxes[:, count:]) for a in answers),
            proposals=selection.proposals,
            denoising=DenoisingOutput(
                tuple(Prediction(a.logits[:, :count], a.boxes[:, :count]) for a in answers), count // extra.group_size
            ),
        )

    def forward(
        self, images: ImageBatch, text: TextBatch, targets: Targets | None = None, noise: DenoisingNoise | None = None
    ) -> DetectorOutput:
        """Images and captions, one caption an image, to predictions. See `detect` for `targets` and `noise`."""
        return self.detect(self.encode_image(images), self.encode_text(text), text, targets, noise)

    def set_activation_checkpointing(self, on: bool) -> None:
        """Recompute backbone blocks and enhancer layers in the backward pass: less memory, about a third more time."""
        self.backbone.recompute = on
        self.feature_enhancer.recompute = on


def build_detector(config: ModelConfig) -> GroundingDINO:
    """A detector with fresh weights. The only reader of `ModelConfig`."""
    return GroundingDINO(config)
