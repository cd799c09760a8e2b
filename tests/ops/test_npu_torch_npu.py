"""Tiers (b) and (c) of the NPU binding: the same tests through torch_npu's real dispatcher, allocator and task queue.

Tests marked `npu` need an NPU. On a card (tier c): `pytest -m npu tests/ops/test_npu_torch_npu.py`. Elsewhere they are
skipped, and the last tests of this file run them in subprocesses over the fake CANN (tier b).
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import npu_cases
import pytest
import torch
from npu_cases import BASE, CASES, Case

from groundingdino.ops import ms_deform_attn
from groundingdino.ops.ms_deform_attn import npu
from groundingdino.runtime import devices

HERE = Path(__file__).parent.parent
FAKE = sys.modules.get("fake_cann.load")  # the plugin that brings the fake CANN, in tier (b)
WITH_NPU = hasattr(torch, "npu") and torch.npu.is_available()
on_npu = pytest.mark.skipif(
    not WITH_NPU, reason="no NPU in this process; the tests at the end run this over a fake CANN"
)
only_fake = pytest.mark.skipif(FAKE is None, reason="reads the fake CANN's counters")

# A card sums in another order than the composite and divides approximately; the fake computes in double.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5} if FAKE else {"rtol": 1e-3, "atol": 1e-3}
BFLOAT16 = {"rtol": 2**-7, "atol": 2e-2}  # rounded on the way in and out


@pytest.fixture(scope="module")
def device() -> torch.device:
    chosen = devices.pick_device("npu")
    devices.tune_process(chosen)
    devices.prepare_device(chosen)
    assert npu.binding_problem() is None
    return chosen


def counted() -> dict[str, int]:
    """Synchronisations until now, without the one made here to let the task queue's copies happen, and all copies."""
    synchronisations = FAKE.counters()["synchronisations"] - counted.own
    torch.npu.synchronize()
    after = FAKE.counters()
    counted.own += after["synchronisations"] - counted.own - synchronisations
    return {**after, "synchronisations": synchronisations}


counted.own = 0


def run(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Output and three gradients on the CPU, through the public function and autograd."""
    *inputs, grad = (t.to(dtype) for t in case.tensors())
    inputs = [t.to(device).requires_grad_() for t in inputs]
    output = ms_deform_attn(inputs[0], case.shapes, inputs[1], inputs[2])
    output.backward(grad.to(device))
    assert all(t.grad.dtype == dtype and t.grad.device.type == "npu" for t in inputs)
    return [output.detach().cpu(), *(t.grad.cpu() for t in inputs)]


@on_npu
@pytest.mark.npu
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_on_the_device_equal_the_composite(device, name):
    case = CASES[name]
    for ours, theirs in zip(run(case, device), npu_cases.truth(case, *case.tensors()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, **TOLERANCE)


@on_npu
@pytest.mark.npu
def test_bfloat16_inputs_give_bfloat16_results(device):
    rounded = [t.bfloat16().float() for t in BASE.tensors()]
    for ours, theirs in zip(run(BASE, device, torch.bfloat16), npu_cases.truth(BASE, *rounded), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, **BFLOAT16)


@on_npu
@pytest.mark.npu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_under_autocast_the_kernel_gets_float32_and_gradients_are_exact(device, precision):
    value, locations, weights, grad = BASE.tensors()
    inputs = [t.to(device).requires_grad_() for t in (value, locations, weights)]
    with devices.autocast(device, precision):
        output = ms_deform_attn(inputs[0], BASE.shapes, inputs[1], inputs[2])
    output.backward(grad.to(device))
    results = [output.detach().cpu(), *(t.grad.cpu() for t in inputs)]
    for ours, theirs in zip(results, npu_cases.truth(BASE, value, locations, weights, grad), strict=True):
        torch.testing.assert_close(ours.double(), theirs, **TOLERANCE)


@on_npu
@pytest.mark.npu
def test_activation_checkpointing_gives_the_same_gradients(device):
    value, locations, weights, grad = BASE.tensors()
    inputs = [t.to(device).requires_grad_() for t in (value, locations, weights)]

    def layer(value, locations, weights):
        return ms_deform_attn(value, BASE.shapes, locations, weights)

    torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False).backward(grad.to(device))
    for ours, theirs in zip(inputs, run(BASE, device)[1:], strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs, **TOLERANCE)


@on_npu
@pytest.mark.npu
@pytest.mark.parametrize("case", [replace(BASE, B=0), replace(BASE, Q=0)], ids=["no images", "no queries"])
def test_empty_inputs_give_zeros(device, case):
    output, *gradients = run(case, device)
    assert output.shape == (case.B, case.Q, case.M * case.C)
    assert all(not g.any() for g in gradients)


@on_npu
@pytest.mark.npu
def test_sizes_that_do_not_fit_and_mixed_devices_are_refused(device):
    value, locations, weights, _ = (t.to(device) for t in BASE.tensors())
    with pytest.raises(ValueError, match="tokens"):
        ms_deform_attn(value[:, 1:], BASE.shapes, locations, weights)
    with pytest.raises(ValueError, match="share a device"):
        ms_deform_attn(value, BASE.shapes, locations.cpu(), weights)
    flat = [size for shape in BASE.shapes for size in shape]
    with pytest.raises(ValueError, match=r"value \[2, 46"):
        torch.ops.groundingdino_aclnn.forward(value[:, 1:], flat, locations, weights)


@on_npu
@pytest.mark.npu
def test_the_aclnn_path_is_an_error_where_the_pair_cannot_compute_it(device, monkeypatch):
    monkeypatch.setenv("GROUNDINGDINO_KERNELS", "require")
    value, locations, weights, _ = (t.to(device) for t in replace(BASE, C=264, M=1).tensors())
    with pytest.raises(RuntimeError, match="requires the kernel of ms_deform_attn, but 264 channels a head"):
        ms_deform_attn(value, BASE.shapes, locations, weights)


@on_npu
@pytest.mark.npu
def test_a_large_model_shape_runs_on_the_second_call_without_waiting_for_the_device(device):
    case = replace(BASE, B=1, Q=900, shapes=((8, 8), (4, 4), (2, 2), (1, 1)))
    value, locations, weights, grad = (t.to(device) for t in case.tensors())
    ms_deform_attn(value, case.shapes, locations, weights)  # copies the level sizes
    torch.npu.synchronize()
    before = counted() if FAKE else None
    output = ms_deform_attn(value, case.shapes, locations, weights)
    flat = [size for shape in case.shapes for size in shape]
    gradients = torch.ops.groundingdino.ms_deform_attn_backward(grad, value, flat, locations, weights)
    if FAKE:
        assert counted() == before  # neither a synchronisation nor a copy
    assert all(torch.isfinite(t.cpu()).all() for t in (output, *gradients))


@only_fake
@pytest.mark.npu
def test_level_sizes_are_copied_once_and_without_waiting(device):
    case = replace(BASE, shapes=((3, 5), (2, 2)))
    value, locations, weights, _ = (t.to(device) for t in case.tensors())
    torch.npu.synchronize()
    before = counted()
    ms_deform_attn(value, case.shapes, locations, weights)
    after = counted()
    assert after["to_device"] - before["to_device"] == 2
    assert after["synchronisations"] == before["synchronisations"]


@only_fake
@pytest.mark.npu
def test_an_error_of_the_device_arrives_with_the_operators_name(device):
    value, locations, weights, _ = (t.to(device) for t in BASE.tensors())
    FAKE.LIBRARIES["libopapi.so"].fake_fail_next_run()
    with pytest.raises(RuntimeError, match="aclnnMultiScaleDeformableAttnFunction"):
        ms_deform_attn(value, BASE.shapes, locations, weights)
        torch.npu.synchronize()


@on_npu
@pytest.mark.npu
def test_the_device_layer_sets_up_the_npu(device):
    assert device == torch.device("npu", 0) and torch.npu.current_device() == 0
    assert torch.npu.conv.allow_hf32 is False and torch.npu.matmul.allow_hf32 is False
    with devices.autocast(device, "bf16"):
        assert torch.get_autocast_dtype("npu") == torch.bfloat16 and torch.is_autocast_enabled("npu")
    assert devices.grad_scaler(device, "fp16").is_enabled() and not devices.grad_scaler(device, "bf16").is_enabled()
    assert devices.fused_adamw(device) == {"fused": True} and devices.pins_memory(device)
    state = devices.random_state(device)
    assert state.device.type == "cpu" and state.dtype == torch.uint8
    devices.set_random_state(device, state)
    assert torch.equal(devices.random_state(device), state)
    devices.synchronize(device)
    assert devices.peak_memory_mib(device) > 0
    with pytest.raises(ValueError, match="device npu:99 does not exist, this process sees"):
        devices.pick_device("npu:99")


# ---- Tier (b): the tests above over the fake CANN ------------------------------------------------------------------

NO_CARD = """
import sys
sys.path.insert(0, "tests")
from fake_cann import load
load.load()
from groundingdino.runtime import devices
try:
    devices.pick_device("npu")
except ValueError as error:
    print(error)
print(devices.pick_device("auto"))
"""


NO_CANN = """
import groundingdino, torch
from groundingdino.runtime import devices
print(devices.pick_device("auto"), torch.ones(2).sum().item())
try:
    devices.pick_device("npu")
except ValueError as error:
    print(error)
"""


def start(arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", **variables}
    env.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": HERE.parent}
    return subprocess.Popen([sys.executable, *arguments], env=env, **options)


@pytest.fixture(scope="module")
def over_the_fake() -> dict[str, tuple[int, str]]:
    """Exit code and output of this file's `npu` tests in each mode of torch_npu's task queue, of a run without a card,
    and of one without CANN; a few at a time, since most of their time is `import torch_npu`."""
    from fake_cann import build

    if build.missing_compiler():
        pytest.skip(build.missing_compiler())
    try:
        build.torch_npu_folder()
    except RuntimeError as error:
        pytest.skip(str(error))
    build.fake_cann(), build.npu_binding()
    tests = ["-m", "pytest", "-p", "fake_cann.load", "-m", "npu", "-p", "no:cacheprovider", __file__]
    jobs = {f"queue {mode}": (tests, {"TASK_QUEUE_ENABLE": mode}) for mode in "012"}
    jobs["no card"] = (["-c", NO_CARD], {"FAKE_CANN_DEVICES": "0"})
    results: dict[str, tuple[int, str]] = {}
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (build.torch_npu_folder(), HERE.parent)))}
    jobs["no CANN"] = (["-c", NO_CANN], paths)
    for names in (list(jobs)[:2], list(jobs)[2:]):
        running = {name: start(jobs[name][0], **jobs[name][1]) for name in names}
        for name, process in running.items():
            output = process.communicate(timeout=300)[0]
            results[name] = process.returncode, output
    return results


@pytest.mark.skipif(WITH_NPU, reason="this process has an NPU")
@pytest.mark.parametrize("mode", "012")
def test_everything_above_passes_over_the_fake_cann(over_the_fake, mode):
    code, output = over_the_fake[f"queue {mode}"]
    assert code == 0, output[-4000:]
    assert " passed" in output and "skipped" not in output and "failed" not in output, output[-2000:]


@pytest.mark.skipif(WITH_NPU, reason="this process has an NPU")
def test_npu_without_a_card_says_so_and_auto_goes_on_without(over_the_fake):
    code, output = over_the_fake["no card"]
    assert code == 0, output[-4000:]
    assert "torch_npu and CANN are installed but no card is visible" in output
    assert "cpu" in output.split()


@pytest.mark.skipif(WITH_NPU, reason="this process has an NPU")
def test_the_library_imports_beside_torch_npu_without_cann_and_says_what_is_missing(over_the_fake):
    code, output = over_the_fake["no CANN"]
    assert code == 0, output[-4000:]
    assert "cpu 2.0" in output
    assert "torch_npu is installed but CANN is not found (libascendcl.so" in output
