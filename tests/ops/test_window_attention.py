"""Window attention: the CPU's kernel, plain torch, and what padding, rolling and partitioning must mean."""

import functools

import pytest
import torch
from op_checks import EVERY_INSTRUCTION_SET, assert_same, output_and_gradients, upstream
from torch import Tensor

from groundingdino.ops import Windows, cpu_library, map_windows, window_attention, window_attention_reference
from groundingdino.ops.window_attention import backward, forward, window_attention_as

CPU = torch.device("cpu")
# Largest error as a fraction of the largest value; sums of up to 144 products in another order.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6}

# batch, height, width, window, shift, heads, channels
CASES = {
    "as_in_swin_b": (1, 30, 25, 12, 6, 4, 32),
    "as_in_swin_t": (2, 20, 15, 7, 3, 3, 32),
    "not_shifted": (2, 13, 10, 4, 0, 3, 8),
    "no_padding": (2, 8, 12, 4, 2, 2, 16),
    "map_smaller_than_a_window": (2, 2, 3, 5, 2, 2, 8),
    "five_channels": (1, 7, 5, 3, 1, 1, 5),
    "one_place": (1, 2, 3, 1, 0, 2, 8),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
needs_kernel = pytest.mark.skipif(cpu_library.library() is None, reason=f"no kernel: {cpu_library.HOW_TO_BUILD}")


def arguments(case: tuple, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Windows]:
    """Random (qkv, padding, bias) and the windows."""
    batch, height, width, window, shift, heads, channels = case
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator).to(dtype)

    windows = map_windows(height, width, window, shift, torch.empty(0, dtype=dtype))
    qkv = randn(batch, height * width, 3, heads, channels)
    return qkv, randn(3, heads, channels), randn(heads, window**2, window**2), windows


@needs_kernel
@EVERY_CASE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@EVERY_INSTRUCTION_SET
def test_the_kernel_equals_plain_torch_in_output_and_gradients(case, dtype, instruction_set):
    qkv, padding, bias, windows = arguments(case, dtype)
    out = forward(qkv, padding, bias, windows, instruction_set)
    actual = [out, *backward(upstream(out), qkv, padding, bias, windows, instruction_set)]
    rounded = [tensor.double() for tensor in (qkv, padding, bias)]
    exact = output_and_gradients(window_attention_reference, *rounded, arguments(case)[3])
    assert {tensor.dtype for tensor in actual} == {dtype}
    assert_same(actual, exact, TOLERANCE[dtype])


@EVERY_CASE
def test_each_token_attends_to_its_window_of_the_padded_and_rolled_map(case):
    """The textbook order: pad, roll, partition, attend, and back."""
    batch, height, width, window, shift, heads, channels = case
    qkv, padding, bias, windows = arguments(case)
    size = [-(-length // window) * window for length in (height, width)]
    padded = padding.expand(batch, *size, -1, -1, -1).clone()
    padded[:, :height, :width] = qkv.view(batch, height, width, 3, heads, channels)
    rolled = padded.roll((-shift, -shift), dims=(1, 2))
    out = torch.empty(batch, *size, heads, channels, dtype=qkv.dtype)
    count = 0
    for top in range(0, size[0], window):
        for left in range(0, size[1], window):
            tile = rolled[:, top : top + window, left : left + window].flatten(1, 2)  # (B, N, 3, M, C)
            q, k, v = tile.permute(2, 0, 3, 1, 4)
            scores = q @ k.mT * channels**-0.5 + bias
            if windows.mask is not None:
                scores = scores + windows.mask[count]
            attended = (scores.softmax(-1) @ v).transpose(1, 2)
            out[:, top : top + window, left : left + window] = attended.unflatten(1, (window, window))
            count += 1
    expected = out.roll((shift, shift), dims=(1, 2))[:, :height, :width].flatten(1, 2)
    torch.testing.assert_close(window_attention_reference(qkv, padding, bias, windows), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(window_attention(qkv, padding, bias, windows), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "off"])
def test_gradients_pass_gradcheck(backend, monkeypatch):
    monkeypatch.setenv("GROUNDINGDINO_KERNELS", backend)
    *tensors, windows = arguments((2, 5, 4, 3, 1, 2, 2))
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *inputs: window_attention(*inputs, windows), leaves)


@pytest.mark.parametrize("backend", ["auto", "off"])
def test_the_operators_pass_opcheck(backend, monkeypatch):
    monkeypatch.setenv("GROUNDINGDINO_KERNELS", backend)
    *tensors, windows = arguments(CASES["not_shifted"], torch.float32)
    places = (windows.token, windows.place, windows.mask)
    operators = torch.ops.groundingdino
    out = window_attention(*tensors, windows)
    torch.library.opcheck(operators.window_attention_backward.default, (upstream(out), *tensors, *places))
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    torch.library.opcheck(operators.window_attention.default, (*leaves, *places))


def test_it_compiles_into_one_graph():
    inputs = arguments(CASES["as_in_swin_t"], torch.float32)
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    expected = output_and_gradients(window_attention, *inputs)
    actual = output_and_gradients(compiled, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@needs_kernel
def test_the_number_of_threads_changes_no_bit():
    inputs = arguments(CASES["as_in_swin_b"], torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(output_and_gradients(window_attention, *inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


def test_each_image_of_a_batch_is_computed_as_if_alone():
    qkv, *rest = arguments(CASES["as_in_swin_t"], torch.float32)
    together = window_attention(qkv, *rest)
    assert torch.equal(together, torch.cat([window_attention(image, *rest) for image in qkv.split(1)]))


@needs_kernel
def test_large_scores_neither_overflow_nor_lose_the_winner():
    qkv, padding, bias, windows = arguments(CASES["as_in_swin_t"], torch.float32)
    qkv = qkv * 100
    out = forward(qkv, padding, bias, windows)
    expected = window_attention_reference(
        qkv.double(), padding.double(), bias.double(), arguments(CASES["as_in_swin_t"])[3]
    )
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-3 * 100)


@needs_kernel
@EVERY_CASE
@EVERY_INSTRUCTION_SET
def test_the_kernel_reads_and_writes_bfloat16_and_computes_in_float32(case, instruction_set):
    qkv, padding, bias, windows = arguments(case, torch.bfloat16)
    out = forward(qkv, padding, bias.float(), windows, instruction_set)
    assert out.dtype == torch.bfloat16
    same_numbers = [tensor.float() for tensor in (qkv, padding, bias)]
    exact = forward(*same_numbers, arguments(case, torch.float32)[3], instruction_set)
    assert torch.equal(out, exact.bfloat16())  # one rounding, at the end


@EVERY_CASE
@pytest.mark.parametrize("backend", ["auto", "off"])
@pytest.mark.parametrize("of_bias", [torch.bfloat16, torch.float32])
def test_bfloat16_outputs_and_gradients_are_within_its_roundings(case, backend, of_bias, monkeypatch):
    monkeypatch.setenv("GROUNDINGDINO_KERNELS", backend)
    qkv, padding, bias, windows = arguments(case, torch.bfloat16)
    bias = bias.to(of_bias)
    actual = output_and_gradients(window_attention, qkv, padding, bias, windows)
    assert [tensor.dtype for tensor in actual] == [torch.bfloat16, torch.bfloat16, torch.bfloat16, of_bias]
    exact = [tensor.double() for tensor in (qkv, padding, bias)]
    expected = output_and_gradients(window_attention_reference, *exact, arguments(case)[3], rounded_to=torch.bfloat16)
    epsilon = torch.finfo(torch.bfloat16).eps
    # One rounding. Plain torch also rounds scores, which are exponents and reach 10 or so, and attention.
    once = epsilon / 2 + TOLERANCE[torch.float32]
    assert_same(actual, expected, once if backend == "auto" and cpu_library.library() else 10 * epsilon)


def test_float16_runs_as_plain_torch():
    qkv, padding, bias, windows = arguments(CASES["not_shifted"], torch.float16)
    assert torch.equal(
        window_attention(qkv, padding, bias, windows), window_attention_reference(qkv, padding, bias, windows)
    )


@EVERY_CASE
def test_composed_and_fused_formulations_agree_in_output_and_gradients(case):
    qkv, padding, bias, windows = arguments(case)
    found = [
        output_and_gradients(functools.partial(window_attention_as, name), qkv, padding, bias, windows)
        for name in ("composed", "sdpa")
    ]
    assert_same(*found, TOLERANCE[torch.float64])
