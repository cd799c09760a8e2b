"""The least time that a computation can take on this machine: its matrix FLOPs over the rate that products reach.

The rate is that of torch's addmm, which every torch program has; `groundingdino.ops.linear` reaches a higher one.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from groundingdino.ops import linear

SHARE = 0.8  # of the FLOPs in plain products: their most frequent shapes are what the rate is measured at
REPEATS = 3
aten = torch.ops.aten


def attention_flops(products: int, *args: Any) -> int:
    """Of so many products of window attention, whose arguments end as (qkv, padding, bias, token, place, mask)."""
    qkv, _, _, token, *_ = args[-6:]
    batch, _, _, heads, channels = qkv.shape
    return products * 2 * batch * heads * channels * token.shape[0] * token.shape[1] ** 2


# By name, what torch has no formula for. What is in neither place, as deformable attention, counts nothing.
FORMULAS: dict[str, Callable[..., int]] = {
    "aten.addmm_": lambda _, left, right: 2 * left.numel() * right.shape[1],
    "groundingdino.window_attention": partial(attention_flops, 2),
    "groundingdino.window_attention_backward": partial(attention_flops, 5),
    "aten._scaled_dot_product_flash_attention_for_cpu": lambda *args: sdpa_flop_count(*(x.shape for x in args[:3])),
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": lambda *args: (
        5 * sdpa_flop_count(*(x.shape for x in args[1:4])) // 2  # 5 products instead of 2
    ),
}

# The weights (out, in) that these operators multiply their first argument (..., in) by, or what comes of it.
LAYERS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "groundingdino.linear": lambda x, weight, *_: (weight,),
    "groundingdino.feed_forward": lambda x, weight1, bias1, weight2, *_: (weight1, weight2),
}


class MatrixWork(TorchDispatchMode):
    """Counts FLOPs of products, convolutions and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.shapes: Counter[tuple[int, int, int]] = Counter()  # (M, K, N) of a product -> its FLOPs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        formula = FORMULAS.get(str(packet))
        if formula is None and packet not in flop_registry and str(packet) not in LAYERS:
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = func(*args, **(kwargs or {}))
        if formula is not None:
            self.flops += formula(*args)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        if packet in (aten.mm, aten.addmm, aten.addmm_):
            left, right = args[-2:]
            self.shapes[left.shape[0], left.shape[1], right.shape[1]] += 2 * left.numel() * right.shape[1]
        for weight in LAYERS.get(str(packet), lambda *_: ())(*args):
            rows, (out, width) = args[0].shape[:-1].numel(), weight.shape
            self.shapes[rows, width, out] += 2 * rows * width * out
            self.flops += 2 * rows * width * out
        return result


@torch.inference_mode()
def rates(shapes: Counter[tuple[int, int, int]]) -> dict[str, float]:
    """FLOPs a second of addmm and of our linear layers over the shapes that carry most of the work, by their work."""
    total, done, needed = sum(shapes.values()), 0, {"addmm": 0.0, "linear": 0.0}
    for (m, k, n), flops in shapes.most_common():
        left, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
        out = torch.empty(m, n)
        products = {
            "addmm": partial(torch.addmm, bias, left, weight.mT, out=out),
            "linear": partial(linear, left, weight, bias),
        }
        for name, product in products.items():
            times = []
            for _ in range(REPEATS):
                started = time.perf_counter()
                product()
                times.append(time.perf_counter() - started)
            needed[name] += flops / (2 * m * k * n) * statistics.median(times)
        done += flops
        if done >= SHARE * total:
            break
    return {name: done / seconds for name, seconds in needed.items()}
