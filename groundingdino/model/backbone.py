"""Swin Transformer (Liu et al. 2021), computing what mmdet's `backbones/swin.py` computes.

Two places differ from timm's own model, and matter to released weights: mmdet pads a map to whole windows *before* it
rolls it (timm rolls first), and it never shrinks a window or drops a shift where the map is smaller than a window.
Padded positions are zeros after the norm, and are not masked.

Axes: B images, H/W of the map, N tokens of a window, C channels, M heads.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor, nn

from groundingdino.config import BackboneConfig
from groundingdino.model.attention import FeedForward
from groundingdino.model.stochastic_depth import DropPath, residual_branch, sample_drop_path
from groundingdino.ops import Linear, Windows, map_windows, window_attention
from groundingdino.ops.windows import ceil_div

PATCH = 4  # pixels a side


@cache
@torch.inference_mode(False)  # cached for training too, whichever caller comes first
def _relative_position_index(window: int, device: torch.device) -> Tensor:
    return get_relative_position_index(window, window, device=device).flatten()


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a learned bias for each relative position."""

    def __init__(self, channels: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.window, self.num_heads = window, num_heads
        self.qkv = Linear(channels, 3 * channels)
        self.proj = Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """Returns (B, H, W, C). x the same, normalised.

        Only real tokens are projected, and one zero, which stands for all padded ones.
        """
        split = (3, self.num_heads, -1)
        qkv = self.qkv(x.flatten(1, 2)).unflatten(-1, split)  # (B, S, 3, M, C / M)
        padding = self.qkv(x.new_zeros(1, x.shape[-1])).view(split)  # (3, M, C / M)
        return self.proj(window_attention(qkv, padding, self.position_bias(), windows).view(x.shape))

    def position_bias(self) -> Tensor:
        """(M, N, N)."""
        table = self.relative_position_bias_table
        index = _relative_position_index(self.window, table.device)
        return table.index_select(0, index).T.unflatten(1, (self.window**2, -1)).contiguous()


class SwinBlock(nn.Module):
    """Pre-norm window attention and MLP."""

    def __init__(self, channels: int, num_heads: int, window: int, recomputes_attention: bool) -> None:
        super().__init__()
        self.recomputes_attention = recomputes_attention
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, num_heads, window)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = FeedForward(channels, 4 * channels, "gelu")

    def forward(self, x: Tensor, windows: Windows, drop_path: tuple[DropPath, DropPath], recompute: bool) -> Tensor:
        """Returns (B, H, W, C).

        Args:
            x: (B, H, W, C).
            windows: of the map, for the block's shift.
            drop_path: the images that take the attention, and those that take the MLP.
            recompute: whether the backward pass computes the MLP again, and the attention where `recomputes_attention`.
        """
        # Window attention
        recompute_attention = recompute and self.recomputes_attention
        x = residual_branch(x, (self.norm1, self.attn), drop_path[0], recompute_attention, windows)

        # MLP
        return residual_branch(x, (self.norm2, self.mlp), drop_path[1], recompute)


class PatchEmbedding(nn.Module):
    """Patches of 4x4 pixels as normalised features; at the right and the bottom they are filled up with zeros."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(channels)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H / 4, W / 4, C), rounded up."""
        height, width = pixels.shape[2:]
        missing = (0, PATCH * ceil_div(width, PATCH) - width, 0, PATCH * ceil_div(height, PATCH) - height)
        return self.norm(self.proj(F.pad(pixels, missing)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Half the resolution: four neighbours become one token of twice the channels. An odd side gets zeros."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H / 2, W / 2, 2 C), rounded up."""
        height, width = x.shape[1:3]
        down, across = ceil_div(height, 2), ceil_div(width, 2)
        x = F.pad(x, (0, 0, 0, 2 * across - width, 0, 2 * down - height))
        x = x.unflatten(2, (across, 2)).unflatten(1, (down, 2))  # (B, H / 2, 2, W / 2, 2, C)
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class SwinStage(nn.Module):
    """Blocks of one resolution, plain and shifted in turn, and the merging into the next.

    Where the backward pass may recompute, it does so with all MLPs, and with the attention of the first stages
    (`recomputes_attention`). On small maps that would save little memory for its time: what is kept grows with the
    channels, the matmuls with their square.
    """

    def __init__(self, config: BackboneConfig, number: int) -> None:
        super().__init__()
        channels, depth = config.embed_dim * 2**number, config.depths[number]
        self.window = config.window_size
        self.shifts = (0, self.window // 2)[:depth]  # the blocks take turns
        self.blocks = nn.ModuleList(
            SwinBlock(channels, config.num_heads[number], self.window, recomputes_attention=number < 2)
            for _ in range(depth)
        )
        self.downsample = PatchMerging(channels) if number + 1 < len(config.depths) else None

    def forward(self, x: Tensor, drop_paths: Sequence[tuple[DropPath, DropPath]], recompute: bool) -> Tensor:
        """Returns x's shape, before merging. x (B, H, W, C), `drop_paths` one per block."""
        height, width = x.shape[1:3]
        windows = {shift: map_windows(height, width, self.window, shift, x) for shift in self.shifts}
        for i, (block, drop_path) in enumerate(zip(self.blocks, drop_paths, strict=True)):
            x = block(x, windows[self.shifts[i % 2]], drop_path, recompute)
        return x


class SwinBackbone(nn.Module):
    """Pixels -> maps of the stages that the detector uses, each through a LayerNorm of its own."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.recompute = False
        self.drop_path_rate = config.drop_path_rate
        self.depths = config.depths
        self.out_stages = config.out_stages
        self.patch_embed = PatchEmbedding(config.embed_dim)
        self.stages = nn.ModuleList(SwinStage(config, number) for number in range(len(config.depths)))
        self.channels = tuple(config.embed_dim * 2**i for i in config.out_stages)
        self.norms = nn.ModuleDict({str(i): nn.LayerNorm(config.embed_dim * 2**i) for i in config.out_stages})
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def drop_path_probabilities(self) -> list[float]:
        """Of each branch, two per block, to be taken: falls linearly from block to block; 1 outside training."""
        blocks = sum(self.depths)
        if not self.training or self.drop_path_rate == 0:
            return [1.0] * (2 * blocks)
        return (1 - torch.linspace(0, self.drop_path_rate, blocks).repeat_interleave(2)).tolist()

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """One (B, C, H / 4 / 2**i, W / 4 / 2**i), rounded up, per stage in `out_stages`; pixels (B, 3, H, W)."""
        x = self.patch_embed(pixels)
        branches = iter(sample_drop_path(self.drop_path_probabilities(), len(x), x.device))
        maps = []
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, SwinStage)

            # Attention in windows
            drop_paths = [(next(branches), next(branches)) for _ in range(self.depths[i])]
            x = stage(x, drop_paths, self.recompute and self.training)

            # A map for the neck
            if i in self.out_stages:
                maps.append(self.norms[str(i)](x).permute(0, 3, 1, 2))

            # Half the resolution
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps
