"""The deformable-attention operator: composite, CPU kernel, and both behind one schema."""

import ctypes
import platform
import sys
import warnings

import pytest
import torch
from ms_deform_attn_cases import CASES, TOLERANCE, arguments, flat
from op_checks import EVERY_INSTRUCTION_SET, assert_same, output_and_gradients, upstream
from torch.utils.checkpoint import checkpoint

from groundingdino.ops import cpu_library, ms_deform_attn, ms_deform_attn_reference
from groundingdino.ops.ms_deform_attn import cpu
from groundingdino.ops.ms_deform_attn.reference import ms_deform_attn_backward_reference

EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
needs_kernel = pytest.mark.skipif(cpu_library.library() is None, reason=f"no CPU kernel: {cpu_library.HOW_TO_BUILD}")


@needs_kernel
@EVERY_CASE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@EVERY_INSTRUCTION_SET
def test_the_kernel_equals_the_composite_in_value_and_gradients(case, dtype, instruction_set):
    value, shapes, locations, weights = arguments(case, dtype)
    out = cpu.forward(value, flat(shapes), locations, weights, instruction_set)
    actual = [out, *cpu.backward(upstream(out), value, flat(shapes), locations, weights, instruction_set)]
    exact = [tensor.double() for tensor in (value, locations, weights)]
    expected = output_and_gradients(ms_deform_attn_reference, exact[0], shapes, exact[1], exact[2])
    assert {tensor.dtype for tensor in actual} == {dtype}
    assert_same(actual, expected, TOLERANCE[dtype])


@needs_kernel
@EVERY_CASE
@EVERY_INSTRUCTION_SET
def test_the_kernel_reads_and_writes_bfloat16_and_computes_in_float32(case, instruction_set):
    value, shapes, locations, weights = arguments(case, torch.float32)
    value = value.bfloat16()
    out = cpu.forward(value, flat(shapes), locations, weights, instruction_set)
    assert out.dtype == torch.bfloat16
    exact = cpu.forward(value.float(), flat(shapes), locations, weights, instruction_set)
    assert torch.equal(out, exact.bfloat16())  # one rounding, at the end


@needs_kernel
def test_the_kernel_rounds_to_bfloat16_as_torch_does():
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.3e38, 3.4e38, 1e-40, float("nan")])
    words = torch.randint(-(2**31), 2**31 - 1, (505,), generator=torch.Generator().manual_seed(0)).int()
    numbers = torch.cat((ties, words.view(torch.float32).nan_to_num()))
    # One pixel of 1, sampled at its centre; each number is the weight of one query.
    count = len(numbers)
    value, locations = torch.ones(1, 1, 1, 16).bfloat16(), torch.full((1, count, 1, 1, 1, 2), 0.5)
    out = cpu.forward(value, [1, 1], locations, numbers.view(1, count, 1, 1, 1))
    assert torch.equal(out[0, :, 0].nan_to_num(nan=7), numbers.bfloat16().nan_to_num(nan=7))


@EVERY_CASE
def test_the_composite_backward_equals_autograd_of_the_composite(case):
    value, shapes, locations, weights = arguments(case)
    expected = output_and_gradients(ms_deform_attn_reference, value, shapes, locations, weights)
    out = expected[0]
    actual = ms_deform_attn_backward_reference(upstream(out), value, shapes, locations, weights)
    assert_same([out, *actual], expected, TOLERANCE[torch.float64])


def test_one_sample_at_a_pixel_centre_reads_that_pixel_of_that_level():
    value = torch.arange(12.0).view(1, 12, 1, 1)  # levels of 2 x 4 and 2 x 2
    locations = torch.tensor([[(2 + 0.5) / 4, (1 + 0.5) / 2], [(1 + 0.5) / 2, (0 + 0.5) / 2]]).view(1, 1, 1, 2, 1, 2)
    weights = torch.tensor([1.0, 100.0]).view(1, 1, 1, 2, 1)
    out = ms_deform_attn(value, ((2, 4), (2, 2)), locations, weights)
    assert out.item() == (1 * 4 + 2) + 100 * (8 + 1)


@pytest.mark.parametrize("function", [ms_deform_attn, ms_deform_attn_reference])
def test_gradients_pass_gradcheck(function):
    value, shapes, locations, weights = arguments((2, 2, 3, 3, ((4, 3), (2, 1)), 2))
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, at, w: function(v, shapes, at, w), leaves)


@pytest.mark.parametrize("backend", ["auto", "off"])
def test_both_operators_pass_opcheck(backend, monkeypatch):
    monkeypatch.setenv("GROUNDINGDINO_KERNELS", backend)
    value, shapes, locations, weights = arguments(CASES["thirteen_channels"], torch.float32)
    out = ms_deform_attn(value, shapes, locations, weights)
    backward = (upstream(out), value, flat(shapes), locations, weights)
    torch.library.opcheck(torch.ops.groundingdino.ms_deform_attn_backward.default, backward)
    leaves = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
    forward = (leaves[0], flat(shapes), leaves[1], leaves[2])
    torch.library.opcheck(torch.ops.groundingdino.ms_deform_attn.default, forward)


@EVERY_CASE
@pytest.mark.parametrize("backend", ["auto", "off"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_sampled_in_float32(case, dtype, backend, monkeypatch):
    monkeypatch.setenv("GROUNDINGDINO_KERNELS", backend)
    value, shapes, locations, weights = arguments(case, torch.float32)
    value = value.to(dtype)
    actual = output_and_gradients(ms_deform_attn, value, shapes, locations, weights)
    assert [tensor.dtype for tensor in actual] == [dtype, dtype, torch.float32, torch.float32]
    exact = (value.double(), shapes, locations.double(), weights.double())
    expected = output_and_gradients(ms_deform_attn_reference, *exact, rounded_to=dtype)
    assert_same(actual[:2], expected[:2], torch.finfo(dtype).eps / 2 + TOLERANCE[torch.float32])  # one rounding
    assert_same(actual[2:], expected[2:], TOLERANCE[torch.float32])


def test_autocast_does_not_lower_the_precision():
    value, shapes, locations, weights = arguments(CASES["as_in_the_decoder"], torch.float32)
    expected = output_and_gradients(ms_deform_attn, value, shapes, locations, weights)
    for backend in ("auto", "off"):
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
            patch.setenv("GROUNDINGDINO_KERNELS", backend)
            actual = output_and_gradients(ms_deform_attn, value, shapes, locations, weights)
        assert actual[0].dtype == torch.float32
        assert_same(actual, expected, TOLERANCE[torch.float32])


def test_activation_checkpointing_gives_the_same_gradients():
    value, shapes, locations, weights = arguments(CASES["five_levels"], torch.float32)

    def recomputed(v, s, at, w):
        return checkpoint(ms_deform_attn, v, s, at, w, use_reentrant=False)

    expected = output_and_gradients(ms_deform_attn, value, shapes, locations, weights)
    actual = output_and_gradients(recomputed, value, shapes, locations, weights)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_it_compiles_into_one_graph():
    """aot_eager traces forward and backward like inductor, without half a minute of C++ compilation."""
    value, shapes, locations, weights = arguments(CASES["five_levels"], torch.float32)
    compiled = torch.compile(ms_deform_attn, fullgraph=True, backend="aot_eager")
    expected = output_and_gradients(ms_deform_attn, value, shapes, locations, weights)
    actual = output_and_gradients(compiled, value, shapes, locations, weights)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_strided_arguments_and_gradients_give_the_same_as_contiguous_ones():
    value, shapes, locations, weights = arguments(CASES["five_levels"], torch.float32)
    expected = output_and_gradients(ms_deform_attn, value, shapes, locations, weights)
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (value, locations, weights)]
    assert not any(tensor.is_contiguous() for tensor in strided)
    leaves = [tensor.detach().requires_grad_() for tensor in strided]
    out = ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2])
    grad = upstream(out).transpose(1, 2).contiguous().transpose(1, 2)
    actual = [out, *torch.autograd.grad(out, leaves, grad)]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_each_image_of_a_batch_is_computed_as_if_alone():
    value, shapes, locations, weights = arguments(CASES["five_levels"], torch.float32)
    together = ms_deform_attn(value, shapes, locations, weights)
    alone = [ms_deform_attn(value[i : i + 1], shapes, locations[i : i + 1], weights[i : i + 1]) for i in range(2)]
    assert torch.equal(together, torch.cat(alone))


@needs_kernel
@pytest.mark.parametrize("shapes", [((8, 7), (3, 2)), ((50, 52), (3, 2))], ids=["packed", "where_tokens_lie"])
def test_the_number_of_threads_changes_no_bit(shapes):
    value, shapes, locations, weights = arguments((2, 3, 32, 600, shapes, 4), torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):  # six (image, head) pairs; packed: whole heads to 1 or 2, tiles to 4
            torch.set_num_threads(threads)
            results.append(output_and_gradients(ms_deform_attn, value, shapes, locations, weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


@needs_kernel
@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="elsewhere torch may bring another OpenMP"
)
def test_the_kernels_find_torchs_threads():
    # parallel.h looks this up; without it every call starts threads of its own.
    assert hasattr(ctypes.CDLL(None), "GOMP_parallel")


@needs_kernel
@pytest.mark.parametrize("far", [1e4, -1e30, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("case", ["as_in_the_decoder", "as_in_the_enhancer"])
def test_a_location_far_outside_samples_zero_and_has_no_gradient(case, far):
    value, shapes, locations, weights = arguments(CASES[case], torch.float32)
    value[:] = float("inf")  # a zero weight times a pixel would show
    locations[..., 0] = far
    grads = output_and_gradients(ms_deform_attn, value, shapes, locations, weights)
    assert all(bool((tensor == 0).all()) for tensor in grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, s, at, w: (v[0], s, at, w), "takes value"),
        (lambda v, s, at, w: (v, s, at[..., :1], w), "takes value"),
        (lambda v, s, at, w: (v[:, 1:], s, at, w), "39 tokens, but value .* has 38"),
        (lambda v, s, at, w: (v, ((5, 6), (9, 0)), at, w), "height, width"),
        (lambda v, s, at, w: (v, (), at, w), "height, width"),
        (lambda v, s, at, w: (v, s, at[:, :, :, :1], w[:, :, :, :1]), "need locations"),
        (lambda v, s, at, w: (v, s, at, w[..., :1]), "differ"),
        (lambda v, s, at, w: (v[:, :, :1], s, at, w), "need locations"),
        (lambda v, s, at, w: (v.expand(2, -1, -1, -1), s, at, w), "need locations"),
        (lambda v, s, at, w: (v, s, at.to("meta"), w), "share a device"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_their_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*change(*arguments(CASES["thirteen_channels"])))


def test_the_environment_can_ask_for_the_composite(monkeypatch):
    value, shapes, locations, weights = arguments(CASES["as_in_the_decoder"], torch.float32)
    monkeypatch.setenv("GROUNDINGDINO_KERNELS", "off")
    expected = ms_deform_attn_reference(value, shapes, locations, weights)
    assert torch.equal(ms_deform_attn(value, shapes, locations, weights), expected)


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("GROUNDINGDINO_KERNELS", "cuda")
    with pytest.raises(ValueError, match="GROUNDINGDINO_KERNELS='cuda'.*auto, require, off"):
        ms_deform_attn(*arguments(CASES["one_point"]))


def test_without_the_built_kernel_it_works_and_says_once_how_to_build(monkeypatch):
    value, shapes, locations, weights = arguments(CASES["as_in_the_decoder"], torch.float32)
    monkeypatch.setattr(cpu_library, "EXTENSION_SUFFIXES", [])
    cpu_library.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="kernels are not built; .*pip install") as caught:
            out = ms_deform_attn(value, shapes, locations, weights)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ms_deform_attn(value, shapes, locations, weights)
    finally:
        cpu_library.library.cache_clear()
    assert torch.equal(out, ms_deform_attn_reference(value, shapes, locations, weights))
