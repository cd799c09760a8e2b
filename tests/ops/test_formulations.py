"""The formulations of deformable attention that any device can run."""

import pytest
import torch
from ms_deform_attn_cases import CASES, TOLERANCE, arguments
from op_checks import assert_same, output_and_gradients, upstream

from groundingdino.ops import ms_deform_attn_reference
from groundingdino.ops.ms_deform_attn import formulations


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_formulation_equals_the_composite_in_value_and_gradients(case, dtype):
    value, shapes, locations, weights = arguments(case, dtype)
    exact = [tensor.double() for tensor in (value, locations, weights)]
    expected = output_and_gradients(ms_deform_attn_reference, exact[0], shapes, exact[1], exact[2])
    for forward in formulations.FORWARD.values():
        assert_same([forward(value, shapes, locations, weights)], expected[:1], TOLERANCE[dtype])
    grad = upstream(expected[0]).to(dtype)
    for backward in formulations.BACKWARD.values():
        assert_same(list(backward(grad, value, shapes, locations, weights)), expected[1:], TOLERANCE[dtype])


def test_infinite_and_nan_locations_sample_zero_and_get_no_gradient():
    value, shapes, locations, weights = arguments(next(iter(CASES.values())), torch.float32)
    locations[:, :, :, :, 0, 0] = float("inf")
    locations[:, :, :, :, -1, 1] = float("nan")
    kept = locations.isfinite().all(-1)
    finite = torch.where(kept[..., None], locations, -9.0)
    expected = ms_deform_attn_reference(value, shapes, finite, weights)
    torch.testing.assert_close(formulations.FORWARD["gather"](value, shapes, locations, weights), expected)
    grads = formulations.BACKWARD["gather, sorted"](torch.ones_like(expected), value, shapes, locations, weights)
    assert all(grad.isfinite().all() for grad in grads) and not grads[1][~kept].any() and not grads[2][~kept].any()
