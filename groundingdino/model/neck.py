"""Backbone maps -> L levels of one width (mmdet `necks/channel_mapper.py`)."""

from collections.abc import Sequence

from torch import Tensor, nn

from groundingdino.config import NORM_GROUPS


class ConvNorm(nn.Module):
    """Convolution and GroupNorm, no activation."""

    def __init__(self, in_channels: int, width: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.GroupNorm(32 if width % 32 == 0 else NORM_GROUPS, width)
        nn.init.xavier_uniform_(self.conv.weight)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H', W')."""
        return self.norm(self.conv(x))


class Neck(nn.Module):
    """One 1x1 projection a map; further levels by a strided 3x3 convolution of the *raw* last map."""

    def __init__(self, in_channels: Sequence[int], width: int, num_levels: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(ConvNorm(channels, width, 1) for channels in in_channels)
        extra_channels = [in_channels[-1], *[width] * num_levels][: num_levels - len(in_channels)]
        self.extra = nn.ModuleList(ConvNorm(channels, width, 3, stride=2) for channels in extra_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps of strides 8 (4), ... 32, each (B, C_l, H_l, W_l) -> L levels, each (B, D, H_l, W_l)."""
        levels = [project(x) for project, x in zip(self.projections, maps, strict=True)]
        x = maps[-1]
        for downsample in self.extra:
            x = downsample(x)
            levels.append(x)
        return levels
