"""Checks of the Triton kernels on any device: a GPU, or the CPU if TRITON_INTERPRET=1 was set before the import.

Run as a program, it makes every check on the CPU and prints one line of JSON: each check's name and what went wrong.
"""

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from ms_deform_attn_cases import CASES, TOLERANCE, arguments, flat
from op_checks import assert_same, output_and_gradients, upstream
from torch import Tensor

from groundingdino.ops import ms_deform_attn, ms_deform_attn_reference
from groundingdino.ops.ms_deform_attn import triton as on_gpu
from groundingdino.ops.ms_deform_attn import triton_kernels
from groundingdino.runtime import tuning

FEW = CASES["five_levels"]
MORE_CHANNELS = {f"{channels}_channels": (1, 2, channels, 5, ((5, 6), (3, 3)), 2) for channels in (16, 24, 100, 256)}


def kernel_results(value: Tensor, shapes: tuple, locations: Tensor, weights: Tensor) -> list[Tensor]:
    """Output and gradients of the kernels themselves."""
    out = triton_kernels.forward(value, flat(shapes), locations, weights)
    return [out, *triton_kernels.backward(upstream(out).to(out.device), value, flat(shapes), locations, weights)]


def exact_results(value: Tensor, shapes: tuple, locations: Tensor, weights: Tensor) -> list[Tensor]:
    """Output and gradients of the composite in float64 on the CPU."""
    value, locations, weights = (tensor.cpu().double() for tensor in (value, locations, weights))
    return output_and_gradients(ms_deform_attn_reference, value, shapes, locations, weights)


def on(device: str, case: tuple, dtype: torch.dtype = torch.float32) -> tuple:
    value, shapes, locations, weights = arguments(case, torch.float32)
    return value.to(device, dtype), shapes, locations.to(device), weights.to(device)


def same(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    assert_same([tensor.cpu() for tensor in actual], [tensor.cpu() for tensor in expected], TOLERANCE[dtype])


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def equals_the_composite(case: tuple, device: str) -> None:
    given = on(device, case)
    same(kernel_results(*given), exact_results(*given))
    with deterministic():
        same(kernel_results(*given), exact_results(*given))


def half_precision_is_read_and_summed_in_float32(device: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        given = on(device, FEW, dtype)
        actual = kernel_results(*given)
        assert [tensor.dtype for tensor in actual] == [dtype, dtype, torch.float32, torch.float32]
        out = actual[0].cpu()
        value, shapes, locations, weights = (t.cpu().double() if isinstance(t, Tensor) else t for t in given)
        leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
        expected = ms_deform_attn_reference(leaves[0], shapes, leaves[1], leaves[2])
        grads = torch.autograd.grad(expected, leaves, upstream(out).double())  # rounded to the dtype, as the kernel's
        same(actual[:2], [expected.detach(), grads[0]], dtype)
        same(actual[2:], list(grads[1:]))


def a_deterministic_gradient_has_the_same_bits_in_any_order_of_the_queries(device: str) -> None:
    value, shapes, locations, weights = on(device, (1, 2, 16, 40, ((3, 2), (1, 1)), 4))  # many samples a pixel
    grad = upstream(torch.empty(1, 40, 32)).to(device)
    order = torch.arange(39, -1, -1, device=device)
    with deterministic():
        first = triton_kernels.backward(grad, value, flat(shapes), locations, weights)[0]
        turned = (grad[:, order], value, flat(shapes), locations[:, order], weights[:, order])
        assert torch.equal(first, triton_kernels.backward(*turned)[0])
        grad[0, 0, 0] = float("nan")
        assert triton_kernels.backward(grad, value, flat(shapes), locations, weights)[0].isnan().all()
        zero = triton_kernels.backward(torch.zeros_like(grad), value, flat(shapes), locations, weights)[0]
        assert (zero == 0).all()


def a_location_far_outside_samples_zero_and_has_no_gradient(device: str) -> None:
    value, shapes, locations, weights = on(device, FEW)
    value[:] = float("inf")  # a zero weight times a pixel would show
    for far in (1e4, -1e30, float("inf"), -float("inf"), float("nan")):
        locations[..., 0] = far
        assert all(bool((tensor == 0).all()) for tensor in kernel_results(value, shapes, locations, weights))


def strided_arguments_give_the_same_as_contiguous_ones(device: str) -> None:
    value, shapes, locations, weights = on(device, FEW)
    expected = kernel_results(value, shapes, locations, weights)
    inside = torch.full((*value.shape[:3], 3 * value.shape[3]), float("nan"), device=device)
    inside[..., 32:64] = value  # as in a packed projection
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (locations, weights)]
    channels_first = value.transpose(1, 3).contiguous().transpose(1, 3)
    for each in (inside[..., 32:64], channels_first):
        assert not each.is_contiguous()
        same(kernel_results(each, shapes, *strided), expected)


def the_operators_pass_opcheck(device: str) -> None:
    value, shapes, locations, weights = on(device, CASES["thirteen_channels"])
    out = ms_deform_attn(value, shapes, locations, weights)
    backward = (upstream(out.cpu()).to(device), value, flat(shapes), locations, weights)
    torch.library.opcheck(torch.ops.groundingdino.ms_deform_attn_backward.default, backward, rtol=1e-5, atol=1e-5)
    leaves = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
    forward = (leaves[0], flat(shapes), leaves[1], leaves[2])
    torch.library.opcheck(torch.ops.groundingdino.ms_deform_attn.default, forward, rtol=1e-5, atol=1e-5)


def gradients_flow_and_it_compiles_into_one_graph(device: str) -> None:
    given = on(device, CASES["thirteen_channels"])
    compiled = torch.compile(ms_deform_attn, fullgraph=True, backend="aot_eager")
    for function in (ms_deform_attn, compiled):
        leaves = [tensor.detach().requires_grad_() for tensor in (given[0], *given[2:])]
        out = function(leaves[0], given[1], leaves[1], leaves[2])
        grads = torch.autograd.grad(out, leaves, upstream(out.cpu()).to(device))
        same([out.detach(), *grads], exact_results(*given))


def every_launch_that_tune_measures_gives_the_same(device: str) -> None:
    value, shapes, locations, weights = on(device, CASES["one_point"])
    expected = exact_results(value, shapes, locations, weights)
    by_direction = on_gpu.launches()
    grad = upstream(expected[0]).to(value)
    for name, forward in by_direction["forward"].items():
        out = forward(value, shapes, locations, weights)
        same([out, *by_direction["backward"][name](grad, value, shapes, locations, weights)], expected)


def the_launch_that_was_measured_is_used(device: str) -> None:
    asked = []

    def choice(place: torch.device, operation: str) -> str:
        asked.append(operation)
        return "1024 elements, 8 warps"

    given = on(device, CASES["one_point"])
    used: list[str | None] = []
    launch_options = triton_kernels.launch_options
    with (
        mock.patch.object(tuning, "choice", choice),
        mock.patch.object(
            triton_kernels, "launch_options", lambda *rest: used.append(rest[-1]) or launch_options(*rest)
        ),
    ):
        output_and_gradients(ms_deform_attn, *given)
    assert asked == ["ms_deform_attn forward, decoder", "ms_deform_attn backward, decoder"]
    assert [name for name in used if name] == ["1024 elements, 8 warps"] * 2  # None: trials whether it runs at all


def no_call_falls_back(device: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ms_deform_attn(*on(device, CASES["one_point"]))
    assert on_gpu.kernel_problem(torch.device(device), torch.float32, 8, 2, True) is None


ON_ANY_DEVICE: dict[str, Callable[[str], None]] = {
    check.__name__: check
    for check in (
        half_precision_is_read_and_summed_in_float32,
        a_deterministic_gradient_has_the_same_bits_in_any_order_of_the_queries,
        a_location_far_outside_samples_zero_and_has_no_gradient,
        strided_arguments_give_the_same_as_contiguous_ones,
        the_operators_pass_opcheck,
        gradients_flow_and_it_compiles_into_one_graph,
        every_launch_that_tune_measures_gives_the_same,
        the_launch_that_was_measured_is_used,
        no_call_falls_back,
    )
}
EVERY_SIZE = CASES | MORE_CHANNELS


def _interpreted() -> dict[str, str | None]:
    """Every check on the CPU; the CPU's operators run what a GPU's do."""
    _let_triton_read_scalars()
    library = torch.library.Library("groundingdino", "IMPL")
    library.impl("ms_deform_attn", on_gpu.forward, "CPU", allow_override=True)
    library.impl("ms_deform_attn_backward", on_gpu.backward, "CPU", allow_override=True)
    problems: dict[str, str | None] = {}
    for name, case in EVERY_SIZE.items():
        if name.startswith("as_in"):  # the interpreter takes its time for every program: have few
            with _large_programs():
                problems[name] = _problem(lambda case=case: equals_the_composite(case, "cpu"))
        else:
            problems[name] = _problem(lambda case=case: equals_the_composite(case, "cpu"))
    return problems | {name: _problem(lambda c=check: c("cpu")) for name, check in ON_ANY_DEVICE.items()}


def _problem(check: Callable[[], None]) -> str | None:
    try:
        check()
    except Exception:  # reported to the test that reads this program's output
        return traceback.format_exc()
    return None


@contextmanager
def _large_programs() -> Iterator[None]:
    before = dict(triton_kernels.LAUNCHES)
    triton_kernels.LAUNCHES["sm_"] = (triton_kernels.Launch(4096, 4),) * 2
    try:
        yield
    finally:
        triton_kernels.LAUNCHES.update(before)


def _let_triton_read_scalars() -> None:
    """Triton 3.5's interpreter turns arrays of one element into int, which NumPy 2.4 refuses."""
    import triton.runtime.interpreter as interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: type, *more: object) -> None:
        patch_tensor(tensor, *more)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(_interpreted(), sys.stdout)
