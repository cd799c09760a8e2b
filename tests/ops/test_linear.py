"""Linear layers: our kernel and torch's own products compute the same."""

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from op_checks import EVERY_INSTRUCTION_SET, HAS_LINEAR_KERNEL, assert_same, output_and_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from groundingdino.ops import Linear, bmm, cpu_library, linear
from groundingdino.ops.linear import forward, matmul, uses_cpu_kernel

pytestmark = pytest.mark.usefixtures("kernels_for_all_sizes")
ROWS = 128
ACTIVATIONS = {"none": nn.Identity(), "relu": nn.ReLU(), "gelu": nn.GELU()}
# rows, in, out: few rows and many, one that no vector length divides, more of all than are computed at a time
SIZES = [((2, 3), 16, 40), ((2, ROWS), 48, 16), ((ROWS, 1, 2), 16, 16), ((5,), 7, 3), ((0, 3), 8, 4)]
SIZES += [((ROWS + 1,), 1025, 6), ((201,), 20, 70), ((2, 5), 20, 70)]
TOLERANCE = 3e-6  # float32 sums of up to 1025 products, all together of size about 1, in another order


def arguments(rows: tuple[int, ...], width_in: int, width_out: int, with_bias: bool = True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    return [randn(*rows, width_in), randn(width_out, width_in) / width_in**0.5, randn(width_out) if with_bias else None]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_output_and_gradients_equal_float64s(size, with_bias, each_path):
    tensors = arguments(*size, with_bias)

    exact = output_and_gradients(nn.functional.linear, *(None if t is None else t.double() for t in tensors))
    actual = output_and_gradients(linear, *tensors)
    scale = max(1, torch.tensor(size[0]).prod().item()) ** 0.5  # the weight's gradient sums over rows
    for a, b in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCE * scale)
    with torch.no_grad():
        torch.testing.assert_close(linear(*tensors).double(), exact[0], rtol=0, atol=TOLERANCE)


@pytest.mark.skipif(cpu_library.library() is None, reason=f"no kernel: {cpu_library.HOW_TO_BUILD}")
@EVERY_INSTRUCTION_SET
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_kernel_equals_float64(size, activation, instruction_set):
    x, weight, bias = arguments(*size)
    exact = ACTIVATIONS[activation](nn.functional.linear(x.double(), weight.double(), bias.double()))
    apart = weight.T.contiguous().T  # the same values, columns after columns
    for given in (weight, apart):
        actual = forward(x, given, bias, activation, instruction_set)
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=TOLERANCE)


HAS_BFLOAT16 = cpu_library.library() is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(not HAS_BFLOAT16, reason="no instructions for bfloat16, or no kernels")
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_bfloat16_product_is_rounded_once(size, activation, with_bias):
    x, weight, bias = (tensor if tensor is None else tensor.bfloat16() for tensor in arguments(*size, with_bias))
    exact = nn.functional.linear(x.double(), weight.double(), bias.double() if with_bias else None)
    with torch.no_grad():
        actual = matmul(x, weight, bias, activation)
        plain = linear(x, weight, bias)
    assert actual.dtype == plain.dtype == torch.bfloat16
    once = torch.finfo(torch.bfloat16).eps / 2
    torch.testing.assert_close(actual.double(), ACTIVATIONS[activation](exact), rtol=once, atol=TOLERANCE)
    torch.testing.assert_close(plain.double(), exact, rtol=once, atol=TOLERANCE)


@pytest.mark.skipif(not HAS_BFLOAT16, reason="no instructions for bfloat16, or no kernels")
def test_bfloat16_products_are_the_kernels_where_no_gradient_is_needed():
    x, weight, _ = (tensor if tensor is None else tensor.bfloat16() for tensor in arguments((9,), 8, 4, False))
    assert uses_cpu_kernel(x, weight)
    assert uses_cpu_kernel(x[:, ::2], weight[:, ::2].contiguous())
    assert not uses_cpu_kernel(x, weight.requires_grad_())
    with torch.no_grad():
        assert uses_cpu_kernel(x, weight)
        assert not uses_cpu_kernel(x, weight.float())
        assert not uses_cpu_kernel(x[:, :4], weight.T)
        strided = x.repeat(1, 2)[:, ::2]
        expected = nn.functional.linear(strided, weight)
        torch.testing.assert_close(linear(strided, weight, None), expected, rtol=2**-7, atol=TOLERANCE)


@pytest.mark.skipif(cpu_library.library() is None, reason=f"no kernel: {cpu_library.HOW_TO_BUILD}")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_a_number_stays_so(activation):
    x, weight, bias = arguments((4,), 8, 4)
    x[1, 3] = float("nan")
    out = matmul(x, weight, bias, activation)
    assert out[1].isnan().all() and out[[0, 2, 3]].isfinite().all()


def test_results_do_not_depend_on_the_number_of_threads():
    tensors, threads = arguments((1000,), 33, 40), torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        with torch.no_grad():
            results.append(linear(*tensors))
    torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_with_and_without_gradient_the_result_is_the_same_to_rounding():
    x, *_ = arguments((ROWS,), 48, 16)
    layer = Linear(48, 16)
    with_gradient = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), with_gradient.detach(), rtol=0, atol=1e-6)


def test_what_needs_no_gradient_gets_none():
    x, weight, bias = arguments((4,), 8, 4)
    weight.requires_grad_()
    linear(x, weight, bias).sum().backward()
    assert x.grad is None and bias.grad is None and weight.grad is not None


def test_its_state_is_that_of_torchs_layer():
    assert Linear(3, 2).state_dict().keys() == nn.Linear(3, 2).state_dict().keys()
    assert Linear(3, 2, bias=False).bias is None


@pytest.mark.skipif(not HAS_LINEAR_KERNEL, reason="torch's own products are computed")
def test_recomputation_stops_before_the_last_product(monkeypatch):
    first, last = Linear(8, 16), Linear(16, 4)
    x = torch.randn(ROWS, 8, requires_grad=True)
    computed = []

    def recorded(x, weight, *rest):
        computed.append(weight)
        return matmul(x, weight, *rest)

    # What is computed twice is seen nowhere else.
    monkeypatch.setattr(sys.modules["groundingdino.ops.linear"], "matmul", recorded)
    out = checkpoint(lambda y: last(first(y).relu()), x, use_reentrant=False)
    out.sum().backward()
    shapes = [tuple(weight.shape) for weight in computed]
    gradients = [(16, 4), (8, 16)]  # of the inputs, by the transposed weights
    assert shapes == [(16, 8), (4, 16), (16, 8), *gradients]
    assert x.grad is not None and first.weight.grad is not None and last.weight.grad is not None


# which factor is transposed, and what the products start from: as the fusion's scores, image update and pooled image
@pytest.mark.parametrize("rows", [7, 2 * ROWS])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("turn, start", [("b", "row"), ("a", "column"), ("", "nothing")])
def test_batched_products_and_their_gradients_equal_float64s(turn, start, batch, rows, each_path):
    generator = torch.Generator().manual_seed(0)
    starts = {"row": [(batch, rows, 1)], "column": [(40,)], "nothing": []}[start]
    a = (batch, 16, rows) if turn == "a" else (batch, rows, 16)
    b = (batch, 40, 16) if turn == "b" else (batch, 16, 40)
    tensors = [torch.randn(*size, generator=generator) for size in (a, b, *starts)]

    def turned(product, a, b, start=None):
        a, b = (tensor.mT if turn == name else tensor for name, tensor in (("a", a), ("b", b)))
        return product(a, b, start)

    def plain(a, b, start):
        return a @ b if start is None else a @ b + start

    exact = output_and_gradients(partial(turned, plain), *(tensor.double() for tensor in tensors))
    assert_same(output_and_gradients(partial(turned, bmm), *tensors), exact, TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_and_autocast_run_as_torchs_own(dtype):
    x, weight, bias = (t.to(dtype) for t in arguments((ROWS,), 8, 4))
    assert not uses_cpu_kernel(x, weight)
    assert torch.equal(linear(x, weight, bias), nn.functional.linear(x, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*arguments((ROWS,), 8, 4)).dtype == torch.bfloat16


def test_without_the_kernel_it_is_torchs_own(monkeypatch):
    tensors = arguments((ROWS,), 8, 4)
    monkeypatch.setenv("GROUNDINGDINO_KERNELS", "off")
    assert torch.equal(linear(*tensors), nn.functional.linear(*tensors))


def test_it_compiles_into_one_graph():
    tensors = arguments((ROWS,), 8, 4)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for a, b in zip(output_and_gradients(compiled, *tensors), output_and_gradients(linear, *tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.skipif(not HAS_LINEAR_KERNEL, reason="nothing to call")
@torch.no_grad()
def test_a_compiled_graph_calls_the_kernel_for_all_sizes_and_an_exported_one_is_torchs_own():
    layer, called = Linear(6, 8), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        called.append({node.target for node in graph.graph.nodes})
        return graph

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 5, 400):
        x = torch.randn(2, rows, 6)
        torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias))
    (targets,) = called
    assert torch.ops.groundingdino.linear in targets and F.linear not in targets
    exported = torch.export.export(layer, (x,), strict=False)
    assert torch.ops.aten.linear.default in {node.target for node in exported.graph.nodes}
