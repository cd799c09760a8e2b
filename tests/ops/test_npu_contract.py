"""Tier (a) of the NPU binding: its contract header registered for CPU tensors over a fake operator library.

The fake makes the argument checks of CANN 8.5.0, has its defects and poisons the workspace; see fake_cann/README.md for
what it cannot show.
"""

import ctypes
import os
import re
import subprocess
import sys
from dataclasses import replace

import npu_cases
import pytest
import torch
from fake_cann import build
from npu_cases import BASE, CASES, Case

from groundingdino.ops.ms_deform_attn import npu

pytestmark = pytest.mark.skipif(build.missing_compiler() is not None, reason=f"{build.missing_compiler()}")

# The fake computes in double and rounds once; float32 inputs cost the padding nothing.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
# Results are rounded to half an ulp of bfloat16 (2^-9) or float16 (2^-12); inputs are exact in both.
ROUNDED = {torch.bfloat16: {"rtol": 2**-8, "atol": 1e-2}, torch.float16: {"rtol": 2**-11, "atol": 2e-3}}


@pytest.fixture(scope="module")
def fake() -> ctypes.CDLL:
    """The fake operator library, with the binding's operators registered for CPU tensors on top of it."""
    library = build.fake_cann()["libopapi.so"]
    with pytest.MonkeyPatch.context() as patch:  # read once; other tests start processes with this environment
        patch.setenv("GROUNDINGDINO_ACLNN_LIBRARY", str(library))
        torch.ops.load_library(build.cpu_binding())
        assert torch.ops.groundingdino_aclnn.library() == str(library)
    return ctypes.CDLL(str(library))


def flat(case: Case) -> list[int]:
    return [size for shape in case.shapes for size in shape]


def run_binding(case: Case, value, locations, weights, grad) -> list[torch.Tensor]:
    op = torch.ops.groundingdino_aclnn
    output = op.forward(value, flat(case), locations, weights)
    return [output, *op.backward(grad, value, flat(case), locations, weights)]


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_composite(fake, name):
    case = CASES[name]
    tensors = case.tensors()
    for ours, theirs in zip(run_binding(case, *tensors), npu_cases.truth(case, *tensors), strict=True):
        torch.testing.assert_close(ours.double(), theirs, **FLOAT32)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_half_precision_goes_in_and_comes_out_but_is_computed_in_float32(fake, dtype):
    tensors = tuple(t.to(dtype) for t in BASE.tensors())
    ours = run_binding(BASE, *tensors)
    assert all(t.dtype == dtype for t in ours)
    for got, expected in zip(ours, npu_cases.truth(BASE, *tensors), strict=True):
        torch.testing.assert_close(got.double(), expected, **ROUNDED[dtype])


def test_views_give_the_same_bits_as_copies(fake):
    value, locations, weights, grad = BASE.tensors()
    value_view = value.transpose(1, 2).contiguous().transpose(1, 2)
    location_view = torch.cat([locations, locations], dim=-1)[..., 2:]
    weight_view = torch.stack([weights, weights])[1]
    grad_view = grad.transpose(1, 2).contiguous().transpose(1, 2)
    views = run_binding(BASE, value_view, location_view, weight_view, grad_view)
    for a, b in zip(views, run_binding(BASE, value, locations, weights, grad), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_without_strides_of_its_own_is_accepted(fake):
    value, locations, weights, grad = BASE.tensors()
    ones = torch.ones(()).expand(grad.shape)  # what sum().backward() sends
    expected = run_binding(BASE, value, locations, weights, torch.ones_like(grad))
    for a, b in zip(run_binding(BASE, value, locations, weights, ones), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", [replace(BASE, B=0), replace(BASE, Q=0)], ids=["no images", "no queries"])
def test_empty_inputs_give_zeros_without_a_call(fake, case):
    before = fake.fake_forward_calls(), fake.fake_backward_calls()
    tensors = case.tensors()
    output, *gradients = run_binding(case, *tensors)
    assert output.shape == tensors[3].shape
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(gradients, tensors[:3], strict=True))
    assert (fake.fake_forward_calls(), fake.fake_backward_calls()) == before


def test_the_arguments_are_left_as_they_were(fake):
    tensors = replace(BASE, C=12, Q=3, P=1).tensors()
    copies = [t.clone() for t in tensors]
    run_binding(replace(BASE, C=12, Q=3, P=1), *tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def wrong(**changes):
    """Arguments of the base case with one of them cut or changed."""
    value, locations, weights, grad = BASE.tensors()
    arguments = {"value": value, "shapes": flat(BASE), "locations": locations, "weights": weights, "grad": grad}
    return {**arguments, **{name: change(arguments[name]) for name, change in changes.items()}}


WRONG = {
    "batch": wrong(value=lambda t: t[:1]),
    "tokens": wrong(value=lambda t: t[:, 1:]),
    "heads": wrong(value=lambda t: t[:, :, 1:]),
    "fewer sizes than levels": wrong(shapes=lambda s: s[:2]),
    "an odd number of sizes": wrong(shapes=lambda s: s[:3]),
    "larger sizes than tokens": wrong(shapes=lambda s: [s[0] + 1, *s[1:]]),
    "an empty level": wrong(shapes=lambda s: [0, *s[1:]]),
    "queries of weights": wrong(weights=lambda t: t[:, 1:]),
    "heads of weights": wrong(weights=lambda t: t[:, :, 1:]),
    "levels of weights": wrong(weights=lambda t: t[:, :, :, 1:]),
    "points of weights": wrong(weights=lambda t: t[..., 1:]),
    "three coordinates": wrong(locations=lambda t: torch.cat([t, t[..., :1]], dim=-1)),
    "dimensions": wrong(value=lambda t: t.flatten(2)),
    "float64": wrong(value=lambda t: t.double()),
    "integers": wrong(weights=lambda t: t.long()),
}


@pytest.mark.parametrize("name", WRONG)
def test_sizes_that_do_not_fit_are_refused_before_the_call(fake, name):
    a = WRONG[name]
    op = torch.ops.groundingdino_aclnn
    before = fake.fake_forward_calls(), fake.fake_backward_calls()
    with pytest.raises(ValueError, match=r"value \["):  # the message has the sizes
        op.forward(a["value"], a["shapes"], a["locations"], a["weights"])
    with pytest.raises(ValueError, match=r"value \["):
        op.backward(a["grad"], a["value"], a["shapes"], a["locations"], a["weights"])
    assert (fake.fake_forward_calls(), fake.fake_backward_calls()) == before


def test_a_gradient_of_the_wrong_size_is_refused(fake):
    value, locations, weights, grad = BASE.tensors()
    with pytest.raises(ValueError, match=r"grad_output \[2, 39, 256\]"):
        torch.ops.groundingdino_aclnn.backward(grad[:, 1:], value, flat(BASE), locations, weights)


BEYOND = {
    "heads": (replace(BASE, M=17, C=8), "17 heads, the most is 16"),
    "levels": (replace(BASE, shapes=((1, 1),) * 17), "17 levels, the most is 16"),
    "points": (replace(BASE, P=17), "17 points, the most is 16"),
    "channels": (replace(BASE, C=257), "257 channels a head, the most is 256"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_the_pair_cannot_do_is_named(fake, name):
    case, reason = BEYOND[name]
    value, locations, weights, _ = case.tensors()
    assert torch.ops.groundingdino_aclnn.refusal(value, locations) == reason
    with pytest.raises(ValueError, match=reason):
        torch.ops.groundingdino_aclnn.forward(value, flat(case), locations, weights)
    value, locations, *_ = BASE.tensors()
    assert torch.ops.groundingdino_aclnn.refusal(value, locations) == ""


def test_an_error_of_the_device_carries_canns_message_and_the_sizes(fake):
    value, locations, weights, grad = BASE.tensors()
    for name, call in {
        "aclnnMultiScaleDeformableAttnFunction": lambda: torch.ops.groundingdino_aclnn.forward(
            value, flat(BASE), locations, weights
        ),
        "aclnnMultiScaleDeformableAttentionGrad": lambda: torch.ops.groundingdino_aclnn.backward(
            grad, value, flat(BASE), locations, weights
        ),
    }.items():
        fake.fake_fail_next_run()
        with pytest.raises(
            RuntimeError, match=f"{name} failed with error 507011: EZ9999.*value \\[2, 47, 8, 32\\] Float"
        ):
            call()
        call()


def test_a_plan_cached_by_another_library_is_forgotten_before_each_call(fake):
    before = fake.fake_cached_plan_resets()
    run_binding(BASE, *BASE.tensors())
    assert fake.fake_cached_plan_resets() == before + 2


# ---- The fake refuses what CANN 8.5.0 refuses: without this the padding above would be tested against nothing ------


def raw_forward(fake: ctypes.CDLL, case: Case, value_dtype: int = 0, output_dtype: int = 0) -> int:
    """The status of the operator's first phase for unpadded arguments, without the binding."""
    value, locations, weights, grad = case.tensors()
    sizes = torch.tensor(case.shapes, dtype=torch.int32)
    starts = torch.tensor([0, *(sizes[:, 0] * sizes[:, 1]).cumsum(0)[:-1]], dtype=torch.int32)
    fake.aclCreateTensor.restype = ctypes.c_void_p

    def handle(tensor: torch.Tensor, dtype: int) -> ctypes.c_void_p:
        dims = (ctypes.c_int64 * tensor.dim())(*tensor.shape)
        strides = (ctypes.c_int64 * tensor.dim())(*tensor.stride())
        count, data = ctypes.c_uint64(tensor.dim()), ctypes.c_void_p(tensor.data_ptr())
        zero = ctypes.c_int64(0)
        return ctypes.c_void_p(fake.aclCreateTensor(dims, count, dtype, strides, zero, 2, dims, count, data))

    inputs = [(value, value_dtype), (sizes, 3), (starts, 3), (locations, 0), (weights, 0), (grad, output_dtype)]
    out = ctypes.c_uint64(), ctypes.c_void_p()
    function = fake.aclnnMultiScaleDeformableAttnFunctionGetWorkspaceSize
    return function(*[handle(*pair) for pair in inputs], ctypes.byref(out[0]), ctypes.byref(out[1]))


@pytest.mark.parametrize(
    ("case", "status"),
    [
        (BASE, 0),
        (replace(BASE, Q=31), 161002),
        (replace(BASE, C=12), 161002),
        (replace(BASE, C=264), 161002),
        (replace(BASE, M=17), 161002),
        (replace(BASE, P=17), 161002),
        (replace(BASE, P=1), 561107),  # the missing kernel
        (replace(BASE, P=1, C=24), 0),
    ],
    ids=str,
)
def test_the_fake_refuses_unpadded_arguments_as_cann_does(fake, case, status):
    assert raw_forward(fake, case) == status


def test_the_fake_refuses_an_output_of_another_dtype(fake):
    assert raw_forward(fake, BASE, value_dtype=0, output_dtype=27) == 161002


# ---- Choosing the path ---------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_choice(fake, monkeypatch):
    """`npu.py` with no memory of earlier choices, whose binding is the one for CPU tensors.

    torch dispatches to `npu.py` by an NPU's tensors alone, which do not exist here: its functions are called directly.
    """
    monkeypatch.setattr(npu, "binding_file", build.cpu_binding)
    npu.binding_problem.cache_clear()
    npu._warn_once.cache_clear()
    yield fake
    npu.binding_problem.cache_clear()
    npu._warn_once.cache_clear()


def call_npu(case: Case) -> list[torch.Tensor]:
    value, locations, weights, grad = case.tensors()
    output = npu._forward(value, flat(case), locations, weights)
    return [output, *npu._backward(grad, value, flat(case), locations, weights)]


@pytest.mark.parametrize(("backend", "calls"), [("auto", 1), ("require", 1), ("off", 0)])
def test_the_environment_chooses_the_path(fresh_choice, monkeypatch, backend, calls):
    monkeypatch.setenv("GROUNDINGDINO_KERNELS", backend)
    before = fresh_choice.fake_forward_calls(), fresh_choice.fake_backward_calls()
    for ours, theirs in zip(call_npu(BASE), npu_cases.truth(BASE, *BASE.tensors()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)  # the composite sums in float32
    assert (fresh_choice.fake_forward_calls(), fresh_choice.fake_backward_calls()) == tuple(n + calls for n in before)


def test_auto_sends_what_the_pair_cannot_do_to_the_composite_with_one_warning(fresh_choice, monkeypatch):
    monkeypatch.delenv("GROUNDINGDINO_KERNELS", raising=False)
    case = replace(BASE, C=264, M=1)
    with pytest.warns(UserWarning, match="264 channels a head, the most is 256") as caught:
        results = call_npu(case)
    assert len(caught) == 1
    for ours, theirs in zip(results, npu_cases.truth(case, *case.tensors()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    monkeypatch.setenv("GROUNDINGDINO_KERNELS", "require")
    with pytest.raises(RuntimeError, match="requires the kernel of ms_deform_attn, but 264 channels"):
        call_npu(case)


def test_without_the_built_binding_one_warning_says_how_to_build_it(fresh_choice, monkeypatch):
    monkeypatch.delenv("GROUNDINGDINO_KERNELS", raising=False)
    monkeypatch.setattr(npu, "binding_file", lambda: None)
    with pytest.warns(UserWarning, match="the binding is not built; where torch_npu is installed, run `pip") as caught:
        call_npu(BASE)
    assert len(caught) == 1


def test_a_binding_that_does_not_load_is_said_in_one_line(fresh_choice, monkeypatch, tmp_path):
    broken = tmp_path / "_npu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(npu, "binding_file", lambda: broken)
    problem = npu.binding_problem()
    assert problem.startswith("_npu.so does not load") and "\n" not in problem


LIBRARY_PROBLEM = """
import sys, torch
torch.ops.load_library(sys.argv[1])
try:
    torch.ops.groundingdino_aclnn.library()
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""


@pytest.mark.parametrize(
    ("library", "message"),
    [
        ("/nowhere/libopapi.so", "no CANN operator library with .*; /nowhere/libopapi.so: cannot open.*set_env.sh"),
        ("libm.so.6", "no CANN operator library with .*; libm.so.6 has no multi-scale deformable attention"),
        (None, "libopapi_nn.so: cannot open.*libopapi.so: cannot open"),
    ],
)
def test_a_missing_operator_library_is_named(library, message):
    variables = {k: v for k, v in os.environ.items() if k not in ("GROUNDINGDINO_ACLNN_LIBRARY", "LD_LIBRARY_PATH")}
    variables |= {"GROUNDINGDINO_ACLNN_LIBRARY": library} if library else {}
    command = [sys.executable, "-c", LIBRARY_PROBLEM, str(build.cpu_binding())]
    result = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(message, result.stdout)
