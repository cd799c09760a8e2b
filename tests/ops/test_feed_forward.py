"""The feed-forward block: the one that never holds its whole hidden layer computes what plain torch computes."""

import sys

import pytest
import torch
import torch.nn.functional as F
from op_checks import EVERY_INSTRUCTION_SET, HAS_LINEAR_KERNEL, output_and_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from groundingdino import ops
from groundingdino.ops import Linear, cpu_library
from groundingdino.ops.feed_forward import forward

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}
pytestmark = pytest.mark.usefixtures("kernels_for_all_sizes")
ROWS, WIDTH, HIDDEN = 50, 12, 40
TOLERANCE = 3e-6  # float32 sums of up to 40 products, of size about 1, in another order


def plain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    return F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)


def layer(weight: Tensor, bias: Tensor) -> Linear:
    """A layer that has these tensors, so that gradients reach them."""
    made = Linear(*weight.shape[::-1], device="meta")
    del made.weight, made.bias
    made.weight, made.bias = weight, bias
    return made


def feed_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    return ops.feed_forward(x, layer(w1, b1), layer(w2, b2), activation)


def arguments(*rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    weights = randn(HIDDEN, WIDTH) / WIDTH**0.5, randn(HIDDEN), randn(WIDTH, HIDDEN) / HIDDEN**0.5, randn(WIDTH)
    return [randn(*rows, WIDTH), *weights]


@pytest.fixture
def few_at_once(monkeypatch):
    """Nine rows at once in the backward pass."""
    monkeypatch.setattr(sys.modules["groundingdino.ops.feed_forward"], "AT_ONCE", 9 * HIDDEN)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [(3, 5), (2, 31), (1,), (0, 4), (2, 3, 100)], ids=str)
def test_in_bfloat16_the_hidden_layer_and_the_result_are_rounded_once(rows, activation):
    tensors = [tensor.bfloat16() for tensor in arguments(*rows)]
    x, w1, b1, w2, b2 = (tensor.double() for tensor in tensors)
    hidden = ACTIVATIONS[activation](F.linear(x, w1, b1))
    with torch.no_grad():
        actual = feed_forward(*tensors, activation)
    assert actual.dtype == torch.bfloat16
    once = torch.finfo(torch.bfloat16).eps / 2
    of_hidden = once * F.linear(hidden.abs(), w2.abs()).max() if hidden.numel() else 0.0
    torch.testing.assert_close(actual.double(), F.linear(hidden, w2, b2), rtol=once, atol=float(of_hidden) + TOLERANCE)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [(3, 5), (2, 31), (1,), (0, 4), (2, 3, 100)], ids=str)
def test_output_and_gradients_equal_float64s(rows, activation, few_at_once):
    tensors = arguments(*rows)
    exact = output_and_gradients(plain, *(tensor.double() for tensor in tensors), activation)
    actual = output_and_gradients(feed_forward, *tensors, activation)
    scale = max(1, torch.tensor(rows).prod().item()) ** 0.5  # the weights' gradients sum over rows
    for a, b in zip(actual, exact, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCE * scale)
    with torch.no_grad():
        torch.testing.assert_close(feed_forward(*tensors, activation).double(), exact[0], rtol=0, atol=TOLERANCE)


@pytest.mark.skipif(cpu_library.library() is None, reason=f"no kernel: {cpu_library.HOW_TO_BUILD}")
@EVERY_INSTRUCTION_SET
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width, hidden", [(12, 40), (70, 1030), (600, 33)])
def test_every_kernel_equals_float64(width, hidden, activation, instruction_set):
    sizes = ((211, width), (hidden, width), (hidden,), (width, hidden), (width,))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) / size[-1] ** 0.5 for size in sizes]
    exact = plain(*(tensor.double() for tensor in tensors), activation)
    torch.testing.assert_close(forward(*tensors, activation, instruction_set).double(), exact, rtol=0, atol=TOLERANCE)


@pytest.mark.skipif(not HAS_LINEAR_KERNEL, reason="plain torch keeps it")
def test_no_more_than_the_rows_at_once_of_the_hidden_layer_ever_exist(few_at_once, monkeypatch):
    module = sys.modules["groundingdino.ops.feed_forward"]
    matmul, sizes = module.matmul, []

    def recorded(*args):
        out = matmul(*args)
        sizes.append(out.numel())
        return out

    # How many rows exist at once is seen nowhere else.
    monkeypatch.setattr(module, "matmul", recorded)
    output_and_gradients(feed_forward, *arguments(50), "gelu")
    assert len(sizes) >= 3 * 5
    assert max(sizes) <= 10 * HIDDEN


@pytest.mark.skipif(not HAS_LINEAR_KERNEL, reason="plain torch has its own order")
def test_recomputation_stops_before_it():
    tensors = [tensor.requires_grad_() for tensor in arguments(ROWS)]
    with Operators() as operators:
        out = checkpoint(lambda x: feed_forward(x * 2, *tensors[1:], "gelu"), tensors[0], use_reentrant=False)
        out.sum().backward()
    assert operators.names.count("groundingdino.feed_forward") == 1
    assert all(tensor.grad is not None for tensor in tensors)


class Operators(TorchDispatchMode):
    """Remembers what runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func._overloadpacket))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_under_autocast_and_in_other_types_it_is_torchs_own(activation):
    tensors = arguments(ROWS)
    double = [tensor.double() for tensor in tensors]
    assert torch.equal(feed_forward(*double, activation), plain(*double, activation))
    with torch.autocast("cpu", torch.bfloat16):
        assert feed_forward(*tensors, activation).dtype == torch.bfloat16


def test_what_needs_no_gradient_gets_none():
    x, *weights = arguments(ROWS)
    x.requires_grad_()
    feed_forward(x, *weights, "relu").sum().backward()
    assert x.grad is not None and all(weight.grad is None for weight in weights)


def test_it_compiles_into_one_graph():
    fc1, fc2 = Linear(WIDTH, HIDDEN), Linear(HIDDEN, WIDTH)

    def block(x: Tensor) -> Tensor:
        return ops.feed_forward(x, fc1, fc2, "gelu")

    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    inputs = (x, *fc1.parameters(), *fc2.parameters())
    outputs = [function(x) for function in (torch.compile(block, fullgraph=True, backend="aot_eager"), block)]
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in outputs]
    for a, b in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("observer", ["hook", "global hook", "adapter"])
def test_layers_that_somebody_observes_or_replaces_are_called(observer):
    fc1, fc2, x = Linear(WIDTH, HIDDEN), Linear(HIDDEN, WIDTH), torch.randn(ROWS, WIDTH)
    expected = ops.feed_forward(x, fc1, fc2, "relu")
    calls = []
    if observer == "adapter":
        fc1 = torch.nn.Sequential(fc1, torch.nn.Identity())
        fc1[1].register_forward_hook(lambda *_: calls.append(1))
    elif observer == "hook":
        fc2.register_forward_pre_hook(lambda *_: calls.append(1))
    else:
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        torch.testing.assert_close(ops.feed_forward(x, fc1, fc2, "relu"), expected, rtol=0, atol=1e-5)
    finally:
        if observer == "global hook":
            handle.remove()
    assert calls
