"""MM-Grounding-DINO from pixels and tokens to boxes. `GroundingDINO.forward` is the paper's figure 3, top to bottom.

Axes: B images, H/W pixels, L levels, S image tokens, T text tokens, Q queries, D width.
"""

from collections.abc import Sequence
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
from groundingdino.model.positions import pixel_encoding
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
    """L maps (B, D, H_l, W_l) -> one row of tokens an image, with positions and the padding worked out.

    Rows and columns are handled apart and met at the end; `_axis` does one of them for all levels at once.
    """
    shapes = tuple((int(x.shape[2]), int(x.shape[3])) for x in levels)
    heights, widths = zip(*shapes, strict=True)
    y = _axis(images.valid[:, None, :, 0], heights, level_embedding.shape[1] // 2)
    x = _axis(images.valid[:, None, 0, :], widths, level_embedding.shape[1] // 2)

    def meet(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
        """(B, H_l, F) and (B, W_l, G) a level -> (B, S, F + G)."""
        pairs = [
            torch.cat((r[:, :, None].expand(-1, -1, c.shape[1], -1), c[:, None].expand(-1, r.shape[1], -1, -1)), dim=-1)
            for r, c in zip(rows, columns, strict=True)
        ]
        return torch.cat([pair.flatten(1, 2) for pair in pairs], dim=1)

    position = meet(y.encoding, x.encoding).to(level_embedding.dtype)
    level = torch.cat([e.expand(h * w, -1) for e, (h, w) in zip(level_embedding, shapes, strict=True)])
    valid = None
    if any(size != images.pixels.shape[2:] for size in images.sizes):
        valid = meet(y.inside, x.inside).all(dim=-1)
    return ImageTokens(
        tokens=torch.cat([x.flatten(2).mT for x in levels], dim=1),
        position=position + level,
        valid=valid,
        valid_ratios=torch.stack((x.ratio, y.ratio), dim=-1),
        grid=meet(y.center, x.center).flip(-1),
        level_sizes=torch.stack((x.size, y.size), dim=-1),
        shapes=shapes,
    )


@dataclass(frozen=True)
class _Axis:
    """Rows (or columns) of the L maps; N is the number in one map."""

    inside: Sequence[Tensor]  # L times (B, N, 1) bool, True = inside the image
    center: Sequence[Tensor]  # L times (B, N, 1), in [0, 1] of the unpadded image
    encoding: Sequence[Tensor]  # L times (B, N, F)
    ratio: Tensor  # (B, L) share of the map that is image
    size: Tensor  # (L,) N, as floats


def _axis(inside: Tensor, sizes: Sequence[int], num_features: int) -> _Axis:
    """inside (B, 1, H) bool, rows of the padded image; sizes of the L maps along this axis."""
    # Nearest, as mmdet `detectors/deformable_detr.py::pre_transformer` shrinks its mask.
    shrunk = torch.cat([F.interpolate(inside.float(), size=size)[:, 0] for size in sizes], dim=1)  # (B, sum of N)
    extent = torch.stack([part.sum(dim=1) for part in shrunk.split(sizes, dim=1)], dim=1)  # (B, L)
    index = torch.cat([torch.arange(size, device=inside.device, dtype=torch.float32) for size in sizes])
    extents = torch.cat([e.expand(-1, size) for e, size in zip(extent.split(1, dim=1), sizes, strict=True)], dim=1)
    size = torch.cat([extent.new_full((1,), size) for size in sizes])
    return _Axis(
        inside=(shrunk > 0.5)[..., None].split(sizes, dim=1),
        center=((index + 0.5) / extents)[..., None].split(sizes, dim=1),
        encoding=pixel_encoding(index, extents, num_features).split(sizes, dim=1),
        ratio=extent / size,
        size=size,
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
        """Recompute in the backward pass: less memory, more time (measured in docs/performance.md).

        Recomputed are the enhancer's layers, the backbone's MLPs, and its attention in the first two stages: in the
        later ones a kept byte saves several times as many FLOPs (`SwinStage`).
        """
        self.backbone.recompute = on
        self.feature_enhancer.recompute = on


def build_detector(config: ModelConfig) -> GroundingDINO:
    """A detector with fresh weights. The only reader of `ModelConfig`."""
    return GroundingDINO(config)
