"""Swin Transformer (Liu et al. 2021) from timm's parts, computing what mmdet's `backbones/swin.py` computes.

Two places differ from timm's own model, and matter to released weights: mmdet pads a map to whole windows *before* it
rolls it (timm rolls first), and it never shrinks a window or drops a shift where the map is smaller than a window.
Padded positions are zeros after the norm, and are not masked.

Axes: B images, H/W of the map, N tokens of a window, C channels, M heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.swin_transformer import PatchMerging, get_relative_position_index, window_partition, window_reverse
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from groundingdino.config import BackboneConfig
from groundingdino.model.attention import FeedForward
from groundingdino.ops import Linear, Windows, window_attention

MASKED = -100.0  # mmdet's "do not look" in a shifted window; its softmax weight vanishes in float32


@cache
@torch.inference_mode(False)  # kept for training too, whoever asks first
def _relative_position_index(window: int, device: torch.device) -> Tensor:
    return get_relative_position_index(window, window, device=device).flatten()


def shift_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(windows, N, N): 0 where two tokens of a shifted window were neighbours before the roll, else -100.

    height and width are those of the padded map.
    """

    def regions(size: int) -> Tensor:
        at = torch.arange(size, device=device)
        return (at >= size - window).float() + (at >= size - shift)

    region = regions(height)[:, None] * 3 + regions(width)[None, :]
    region = window_partition(region[None, :, :, None], (window, window)).flatten(1)  # (windows, N)
    return (region[:, None, :] != region[:, :, None]) * MASKED


def map_windows(height: int, width: int, window: int, shift: int, device: torch.device, dtype: torch.dtype) -> Windows:
    """The windows of one map, worked out once on token numbers instead of in every block on features."""
    size = (window, window)
    tokens = torch.arange(height * width, device=device).view(height, width)
    tokens = F.pad(tokens, (0, -width % window, 0, -height % window), value=height * width)
    rolled = torch.roll(tokens, (-shift, -shift), dims=(0, 1))
    places = window_reverse(torch.arange(tokens.numel(), device=device).view(-1, *size, 1), size, *tokens.shape)
    place = torch.roll(places[0, :, :, 0], (shift, shift), dims=(0, 1))[:height, :width]
    return Windows(
        token=window_partition(rolled[None, :, :, None], size).flatten(1),
        place=place.flatten(),
        mask=shift_mask(*tokens.shape, window, shift, device).to(dtype) if shift else None,
    )


@dataclass(frozen=True)
class Kept:
    """The images that take a branch of a block in this step (stochastic depth, Huang et al. 2016)."""

    count: int
    index: Tensor | None  # (count,) their numbers in the batch; None for all
    weight: float  # of the branch's result: 1 / the probability to be kept

    def take(self, x: Tensor) -> Tensor:
        """(B, ...) -> (count, ...). What is not taken is not computed either."""
        return x if self.index is None else x.index_select(0, self.index)

    def add(self, x: Tensor, change: Tensor) -> Tensor:
        """x (B, ...) with change (count, ...) added to the images that were taken."""
        if self.index is None:
            return torch.add(x, change, alpha=self.weight)
        return torch.index_add(x, 0, self.index, change.to(x.dtype), alpha=self.weight)


class ZeroGradients(torch.autograd.Function):
    """x, and gradients of zero for the parameters that were not needed: an optimizer decays what has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        """x unchanged."""
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """The gradient of x as it comes."""
        return (grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors))


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a learned bias for each relative position."""

    def __init__(self, channels: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(channels, 3 * channels)
        self.proj = Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, windows: Windows, bias: Tensor) -> Tensor:
        """x (B, H, W, C) normalised, bias (M, N, N). Returns (B, H, W, C).

        Only real tokens are projected: what is padded is zero, and its projection the projection's bias.
        """
        split = (3, self.num_heads, -1)
        qkv = self.qkv(x.flatten(1, 2))
        padding = self.qkv.bias.to(qkv.dtype).unflatten(0, split)
        return self.proj(window_attention(qkv.unflatten(-1, split), padding, bias, windows).view(x.shape))


class SwinBlock(nn.Module):
    """Pre-norm window attention and MLP."""

    def __init__(self, channels: int, num_heads: int, window: int, shifted: bool) -> None:
        super().__init__()
        self.shift = window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, num_heads, window)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = FeedForward(channels, 4 * channels, "gelu")

    def forward(
        self, x: Tensor, windows: Windows, bias: Tensor, kept: tuple[Kept, Kept], recompute: tuple[bool, bool]
    ) -> Tensor:
        """One block.

        Args:
            x: (B, H, W, C).
            windows: of the map, for the block's shift.
            bias: (M, N, N) what the attention adds to its scores.
            kept: the images that take the attention, and those that take the MLP.
            recompute: whether the backward pass computes the attention again, and the MLP.

        Returns:
            (B, H, W, C).
        """
        x = add_branch(x, kept[0], recompute[0], self.norm1, self.attn, windows, bias)
        return add_branch(x, kept[1], recompute[1], self.norm2, self.mlp)


def add_branch(x: Tensor, kept: Kept, recompute: bool, norm: nn.Module, branch: nn.Module, *inputs: Any) -> Tensor:
    """x (B, ...) + branch(norm(x), *inputs), for the images that take it.

    The sum is not computed again, so that recomputation ends before the branch's last product, which no gradient inside
    needs.
    """
    if not kept.count:
        return ZeroGradients.apply(x, *norm.parameters(), *branch.parameters())

    def change(x: Tensor) -> Tensor:
        return branch(norm(kept.take(x)), *inputs)

    return kept.add(x, checkpoint(change, x, use_reentrant=False) if recompute else change(x))


class SwinStage(nn.Module):
    """Blocks of one resolution, plain and shifted in turn, and the merging into the next.

    Where the backward pass may compute again, it does so with all MLPs, and with the attention of large maps
    (`recomputes_attention`). On small maps that would save little memory for the time it takes: what is kept grows with
    the channels, the products with their square.
    """

    def __init__(
        self, channels: int, num_heads: int, window: int, depth: int, downsample: bool, recomputes_attention: bool
    ) -> None:
        super().__init__()
        self.window = window
        self.recomputes_attention = recomputes_attention
        self.blocks = nn.ModuleList(SwinBlock(channels, num_heads, window, shifted=i % 2 == 1) for i in range(depth))
        self.downsample = PatchMerging(channels) if downsample else None

    def position_biases(self) -> Sequence[Tensor]:
        """(M, N, N) a block, all looked up at once."""
        tables = torch.stack([block.attn.relative_position_bias_table for block in self.blocks], dim=-1)
        index = _relative_position_index(self.window, tables.device)
        tokens = self.window**2
        return (
            tables.index_select(0, index)
            .view(tokens, tokens, *tables.shape[1:])
            .permute(3, 2, 0, 1)
            .contiguous()
            .unbind()
        )

    def forward(self, x: Tensor, kept: Sequence[tuple[Kept, Kept]], recompute: bool) -> Tensor:
        """x (B, H, W, C), `kept` one a block -> x's shape, before merging."""
        windows = {
            shift: map_windows(*x.shape[1:3], self.window, shift, x.device, x.dtype)
            for shift in {block.shift for block in self.blocks}
        }
        for block, bias, images in zip(self.blocks, self.position_biases(), kept, strict=True):
            x = block(x, windows[block.shift], bias, images, (recompute and self.recomputes_attention, recompute))
        return x


class SwinBackbone(nn.Module):
    """Pixels -> maps of the stages that the detector uses, each through a LayerNorm of its own."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.recompute = False
        self.drop_path_rate = config.drop_path_rate
        self.out_stages = config.out_stages
        self.patch_embed = PatchEmbed(
            img_size=None, patch_size=4, embed_dim=config.embed_dim, norm_layer=nn.LayerNorm,
            output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=True,
        )  # fmt: skip
        last = len(config.depths) - 1
        self.stages = nn.ModuleList(
            SwinStage(
                config.embed_dim * 2**i,
                heads,
                config.window_size,
                depth,
                downsample=i < last,
                recomputes_attention=i < 2,
            )
            for i, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True))
        )
        self.channels = tuple(config.embed_dim * 2**i for i in config.out_stages)
        self.norms = nn.ModuleDict({str(i): nn.LayerNorm(config.embed_dim * 2**i) for i in config.out_stages})
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def draw_kept(self, batch: int, device: torch.device) -> list[tuple[Kept, Kept]]:
        """Which images take which branch, one pair a block.

        The probability to skip a branch rises linearly from block to block; outside training nothing is skipped. Drawn
        on the host, which has to know what to compute.
        """
        blocks = sum(len(stage.blocks) for stage in self.stages)
        if not self.training or self.drop_path_rate == 0:
            return [(Kept(batch, None, 1.0),) * 2] * blocks
        probability = 1 - torch.linspace(0, self.drop_path_rate, blocks).repeat_interleave(2)
        drawn = (torch.rand(2 * blocks, batch) < probability[:, None]).tolist()
        numbers = [[image for image, taken in enumerate(images) if taken] for images in drawn]
        indices = torch.tensor(list(chain.from_iterable(numbers)), dtype=torch.int64).to(device, non_blocking=True)
        kept = [
            Kept(len(index), None if len(index) == batch else index, 1 / keep)
            for index, keep in zip(indices.split([len(n) for n in numbers]), probability.tolist(), strict=True)
        ]
        return list(zip(kept[::2], kept[1::2], strict=True))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised -> one (B, C, H / 4 / 2**i, W / 4 / 2**i) a stage in `out_stages`, rounded up."""
        x = self.patch_embed(pixels)
        kept = iter(self.draw_kept(len(x), x.device))
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x, list(islice(kept, len(stage.blocks))), self.recompute and self.training)
            if i in self.out_stages:
                maps.append(self.norms[str(i)](x).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps
