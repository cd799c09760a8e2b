"""The least time that a computation can take on this machine: its matrix FLOPs over the rate that addmm reaches."""

import statistics
import time
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

SHARE = 0.8  # of the FLOPs in plain products: their most frequent shapes are what the rate is measured at
REPEATS = 3
aten = torch.ops.aten


class MatrixWork(TorchDispatchMode):
    """Counts FLOPs of products, convolutions and attention. Operators of our own have no formula and count nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.shapes: Counter[tuple[int, int, int]] = Counter()  # (M, K, N) of a product -> its FLOPs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet not in flop_registry and packet is not aten._scaled_dot_product_flash_attention_for_cpu:
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = func(*args, **(kwargs or {}))
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu:  # has no formula in torch 2.9
            self.flops += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.flops += 5 * sdpa_flop_count(*(x.shape for x in args[1:4])) // 2  # 5 products instead of 2
        if packet in (aten.mm, aten.addmm):
            left, right = args[-2:]
            self.shapes[left.shape[0], left.shape[1], right.shape[1]] += 2 * left.numel() * right.shape[1]
        return result


def rate(shapes: Counter[tuple[int, int, int]]) -> float:
    """FLOPs a second of addmm over the shapes that carry most of the work, each weighted by its work."""
    total, done, needed = sum(shapes.values()), 0, 0.0
    for (m, k, n), flops in shapes.most_common():
        left, weight, bias = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
        out = torch.empty(m, n)
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            torch.addmm(bias, left, weight.mT, out=out)
            times.append(time.perf_counter() - started)
        needed += flops / (2 * m * k * n) * statistics.median(times)
        done += flops
        if done >= SHARE * total:
            break
    return done / needed
