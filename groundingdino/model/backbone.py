"""Swin Transformer (Liu et al. 2021) from timm's parts, computing what mmdet's `backbones/swin.py` computes.

Two places differ from timm's own model, and matter to released weights: mmdet pads a map to whole windows *before* it
rolls it (timm rolls first), and it never shrinks a window or drops a shift where the map is smaller than a window.
Padded positions are zeros after the norm, and are not masked.

Axes: B images, H/W of the map, N tokens of a window, C channels, M heads.
"""

from collections.abc import Sequence
from functools import cache
from itertools import islice

import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed, trunc_normal_
from timm.models.swin_transformer import PatchMerging, get_relative_position_index, window_partition, window_reverse
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from groundingdino.config import BackboneConfig
from groundingdino.ops import Windows, window_attention

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


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a learned bias for each relative position."""

    def __init__(self, channels: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
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
        self.mlp = Mlp(channels, 4 * channels)

    def forward(self, x: Tensor, windows: Windows, bias: Tensor, keep: Tensor | None) -> Tensor:
        """One block.

        Args:
            x: (B, H, W, C).
            windows: of the map, for the block's shift.
            bias: (M, N, N) what the attention adds to its scores.
            keep: (2, B, 1, 1, 1) weights of the two branches, see `drop_path_weights`; None for 1.

        Returns:
            (B, H, W, C).
        """
        attended = self.attn(self.norm1(x), windows, bias)
        x = x + attended if keep is None else torch.addcmul(x, attended, keep[0])
        widened = self.mlp(self.norm2(x))
        return x + widened if keep is None else torch.addcmul(x, widened, keep[1])


class SwinStage(nn.Module):
    """Blocks of one resolution, plain and shifted in turn, and the merging into the next."""

    def __init__(self, channels: int, num_heads: int, window: int, depth: int, downsample: bool) -> None:
        super().__init__()
        self.window = window
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

    def forward(self, x: Tensor, keep: Sequence[Tensor | None], recompute: bool) -> Tensor:
        """x (B, H, W, C), `keep` one a block -> x's shape, before merging."""
        windows = {
            shift: map_windows(*x.shape[1:3], self.window, shift, x.device, x.dtype)
            for shift in {block.shift for block in self.blocks}
        }
        for block, bias, weights in zip(self.blocks, self.position_biases(), keep, strict=True):
            inputs = (x, windows[block.shift], bias, weights)
            x = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
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
            SwinStage(config.embed_dim * 2**i, heads, config.window_size, depth, downsample=i < last)
            for i, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True))
        )
        self.channels = tuple(config.embed_dim * 2**i for i in config.out_stages)
        self.norms = nn.ModuleDict({str(i): nn.LayerNorm(config.embed_dim * 2**i) for i in config.out_stages})
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def drop_path_weights(self, batch: int, like: Tensor) -> list[Tensor | None]:
        """Stochastic depth (Huang et al. 2016), drawn for the whole backbone at once.

        One (2, batch, 1, 1, 1) a block: 0 where an image skips a branch, else 1 / probability; the probability to skip
        rises linearly from block to block. None a block outside training.
        """
        blocks = sum(len(stage.blocks) for stage in self.stages)
        if not self.training or self.drop_path_rate == 0:
            return [None] * blocks
        kept = 1 - torch.linspace(0, self.drop_path_rate, blocks, device=like.device).view(-1, 1, 1, 1, 1, 1)
        drawn = torch.rand(blocks, 2, batch, 1, 1, 1, device=like.device) < kept
        return list((drawn / kept).to(like.dtype).unbind())

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised -> one (B, C, H / 4 / 2**i, W / 4 / 2**i) a stage in `out_stages`, rounded up."""
        x = self.patch_embed(pixels)
        keep = iter(self.drop_path_weights(len(x), x))
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x, list(islice(keep, len(stage.blocks))), self.recompute and self.training)
            if i in self.out_stages:
                maps.append(self.norms[str(i)](x).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps
