"""Low-rank adapters (Hu et al. 2021, "LoRA"): a frozen matrix W becomes W + B A, and only A and B are trained.

They are parametrizations of torch, so no layer knows of them. A matrix that packs queries, keys and values has a B A
for each of the three.
"""

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from groundingdino.model.attention import CrossAttention, DeformableAttention, FeedForward, SelfAttention
from groundingdino.model.backbone import WindowAttention
from groundingdino.model.detector import GroundingDINO
from groundingdino.model.fusion import Fusion

PARTS = ("backbone", "text_encoder", "feature_enhancer", "decoder")  # those with attention
BLOCKS = (WindowAttention, SelfAttention, CrossAttention, DeformableAttention, FeedForward, Fusion)
PACKED = ("in_proj_weight", "qkv.weight")  # queries, keys and values, in equal shares
NOT_A_MATRIX = "relative_position_bias_table"
MARK = ".parametrizations."


class LowRank(nn.Module):
    """W -> W + B A; starts at W."""

    def __init__(self, weight: Tensor, rank: int, blocks: int) -> None:
        """`blocks` is the number of projections, one below the other, in `weight` (out, in)."""
        super().__init__()
        width_out, width_in = weight.shape
        bound = width_in**-0.5  # that of nn.Linear
        self.a = nn.Parameter(weight.new_empty(blocks, rank, width_in).uniform_(-bound, bound))
        self.b = nn.Parameter(weight.new_zeros(blocks, width_out // blocks, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """(out, in) -> (out, in), in the weight's own precision also under autocast: as if it were merged."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight + low_rank_change(self.a, self.b)


def low_rank_change(a: Tensor, b: Tensor) -> Tensor:
    """B A, (out, in), of a (blocks, rank, in) and b (blocks, out / blocks, rank)."""
    return (b @ a).flatten(0, 1)


def matrices(model: GroundingDINO, parts: Collection[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and value of every attention and feed-forward matrix of the named children of the model."""
    for part in parts:
        for prefix, block in model.get_submodule(part).named_modules(prefix=part):
            if isinstance(block, BLOCKS):
                for name, parameter in block.named_parameters(prefix=prefix):
                    if parameter.dim() == 2 and not name.endswith(NOT_A_MATRIX):
                        yield name, parameter


def add_adapters(model: GroundingDINO, rank: int, parts: Collection[str]) -> None:
    """Freeze the model, and adapt the matrices of some parts of it.

    Args:
        model: on the device where it will be trained.
        rank: of each B A; of a matrix with a shorter side that side.
        parts: some of `PARTS`.
    Raises:
        ValueError: a rank below 1, or no part to adapt.
    """
    if rank < 1 or not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"adapters have a rank from 1 and are of {', '.join(PARTS)}; got {rank} of {list(parts)}")
    model.requires_grad_(False)
    for name, weight in list(matrices(model, parts)):
        owner, _, own_name = name.rpartition(".")
        blocks = 3 if name.endswith(PACKED) else 1
        low_rank = LowRank(weight, min(rank, *weight.shape), blocks)
        parametrize.register_parametrization(model.get_submodule(owner), own_name, low_rank)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Every A and B, as "name of the matrix.a" and "name of the matrix.b"; empty without adapters."""
    found = {}
    for name, tensor in model.state_dict().items():
        owner, mark, rest = name.partition(MARK)
        own_name, _, kind = rest.partition(".0.")
        if mark and kind:
            found[f"{owner}.{own_name}.{kind}"] = tensor
    return found


def base_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model as it was before `add_adapters`."""
    base = {}
    for name, tensor in state.items():
        owner, mark, rest = name.partition(MARK)
        if not mark:
            base[name] = tensor
        elif rest.endswith(".original"):
            base[f"{owner}.{rest.removesuffix('.original')}"] = tensor
    return base


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model without adapters that computes the same; of a model without them its own."""
    return merge_adapter(base_state(model.state_dict()), adapter_state(model))


@torch.no_grad()
def merge_adapter(base: dict[str, Tensor], adapter: dict[str, Tensor], weight: float = 1.0) -> dict[str, Tensor]:
    """A copy of `base_state` with `weight` times the B A of an `adapter_state` added."""
    merged = dict(base)
    for name in adapter:
        if name.endswith(".a"):
            matrix = name.removesuffix(".a")
            merged[matrix] = base[matrix] + weight * low_rank_change(adapter[name], adapter[f"{matrix}.b"])
    return merged
