"""The whole program on a simulated NPU: model, training, resuming, evaluation, predictor, two ranks over HCCL.

Tests that need the simulator are skipped in a plain run; the last tests of this file run them in a subprocess with the
plugin `npu_simulator.simulator`, where torch_npu's wheel and a compiler can be had.
"""

import dataclasses
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from gradient_ranks import NO_DROPOUT, float32_batch
from loader_facts import LoaderFacts
from torch.utils.data import DataLoader
from training_runs import free_port, losses, scenes, small_config

from groundingdino import load_model
from groundingdino.cli import operator_report, selfcheck, tuning_report
from groundingdino.config import BackboneConfig, ModelConfig, OptimizerConfig, TrainConfig
from groundingdino.inference.engine import Engine
from groundingdino.inference.prompts import Categories, resolve
from groundingdino.inputs.images import ImageGeometry, ResizedImage, collate_images
from groundingdino.inputs.text import collate_text, default_tokenizer
from groundingdino.model import GroundingDINO, build_detector
from groundingdino.model.denoising import draw_noise
from groundingdino.ops import ms_deform_attn, ms_deform_attn_reference
from groundingdino.ops.ms_deform_attn import npu
from groundingdino.runtime import devices, tuning
from groundingdino.runtime.tuning import Table
from groundingdino.structures import to_device
from groundingdino.training.learner import Learner
from groundingdino.training.optimizer import adamw_options, finite_step
from groundingdino.training.trainer import fit

HERE = Path(__file__).parent.parent
SIMULATOR = sys.modules.get("npu_simulator.simulator")  # the plugin
simulated = pytest.mark.skipif(SIMULATOR is None, reason="runs in a subprocess, on the simulated NPU")

NO_KERNEL = "not currently supported on the NPU backend"  # torch_npu computes it on the host instead

# Both devices run the same CPU kernels but for deformable attention: float32 against double, and sums in other orders.
LOSS = 1e-5


def jittered(model: ModelConfig) -> GroundingDINO:
    """Fresh weights whose sampling offsets are not whole pixels, where bilinear sampling has a kink."""
    detector = build_detector(model)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if "sampling_offsets" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return detector


def same_draws(targets, *sizes):
    """Denoising noise from the CPU's generator on either device; otherwise each device has its own random numbers."""
    return to_device(draw_noise(to_device(targets, "cpu"), *sizes), targets.boxes.device)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return scenes(tmp_path_factory.mktemp("data"))


def four_steps(data: Path, run: Path, **changes: Any) -> TrainConfig:
    """An epoch of four steps with four images on the NPU, and an evaluation."""
    config = small_config(data, run, **{"device": "npu", "epochs": 1, "pictures": 0, **changes})
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=4))


def unevaluated(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, evaluation=()))


def deterministic_run(data: Path, run: Path, device: str) -> Path:
    """A run of four steps, without dropout. At this rate training does not yet amplify that sums are taken in other
    orders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("groundingdino.model.detector.draw_noise", same_draws)
        patch.setattr("groundingdino.training.trainer.initial_model", lambda config: jittered(config.model))
        optimizer = OptimizerConfig(lr=1e-4, scale_lr=False)
        fit(four_steps(data, run, device=device, model=NO_DROPOUT, optimizer=optimizer))
    return run


@pytest.fixture(scope="module")
def on_cpu(data, tmp_path_factory) -> Path:
    return deterministic_run(data, tmp_path_factory.mktemp("cpu"), "cpu")


@pytest.fixture(scope="module", params=["auto", "off"])
def cpu_and_npu(request, data, on_cpu, tmp_path_factory) -> dict[str, Path]:
    """The same run on either device: the run folders; with the operators, and with the composite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROUNDINGDINO_KERNELS", request.param)
        return {"cpu": on_cpu, "npu": deterministic_run(data, tmp_path_factory.mktemp("npu"), "npu")}


@simulated
def test_float32_losses_of_every_step_equal_the_cpus(cpu_and_npu):
    on_cpu, on_npu = losses(cpu_and_npu["cpu"]), losses(cpu_and_npu["npu"])
    assert on_cpu.keys() == on_npu.keys() and len(on_npu) == 4
    worst = 0.0
    for step, terms in on_cpu.items():
        for name, value in terms.items():
            if name != "grad_norm":  # sums up the jumps of the gradient where a sampling point crosses a pixel
                difference = abs(on_npu[step][name] - value) / max(abs(value), 1.0)
                worst = max(worst, difference)
                assert difference <= LOSS, (step, name)
    print(f"worst difference of a loss between the devices: {worst:.1e}")


@simulated
def test_evaluation_and_predictor_give_the_cpus_answers(cpu_and_npu, data):
    rows = [json.loads(line) for line in (cpu_and_npu["npu"] / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" not in row for row in rows)  # an evaluation was written down
    path = cpu_and_npu["npu"] / "final.safetensors"
    image = sorted((data / "train2014").iterdir())[0]
    found = [load_model(path, device=device).predict(image, referring="the red circle") for device in ("cpu", "npu")]
    torch.testing.assert_close(found[0].boxes, found[1].boxes.cpu(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found[0].scores, found[1].scores.cpu(), rtol=1e-4, atol=1e-5)


class Stop(Exception):
    pass


def stop_after(steps: int) -> Callable:
    """A `Learner.step` that raises once it has taken so many steps."""
    step, taken = Learner.step, 0

    def limited(self, *arguments):
        nonlocal taken
        if taken == steps:
            raise Stop
        taken += 1
        return step(self, *arguments)

    return limited


@simulated
def test_a_resumed_run_takes_the_steps_of_an_uninterrupted_one(data, tmp_path):
    """With dropout, drop path and noise from the device's random generator, in fp16 with its loss scale."""
    changes = {"device": "npu", "epochs": 1, "pictures": 0, "precision": "fp16"}
    configs = [unevaluated(small_config(data, tmp_path / name, **changes)) for name in ("straight", "broken")]
    fit(configs[0])
    with mock.patch.object(Learner, "step", stop_after(5)), pytest.raises(Stop):
        fit(configs[1])
    fit(dataclasses.replace(configs[1], resume="auto"))
    straight, broken = losses(configs[0].run_dir), losses(configs[1].run_dir)
    assert len(straight) == 8 and broken == straight
    assert any(
        terms["grad_norm"] is not None for terms in straight.values()
    )  # the scale has come down: steps are taken


@simulated
def test_checkpointing_recomputes_the_same_dropout_and_gives_the_same_losses(data, tmp_path):
    found = []
    for checkpointing in (False, True):
        run = tmp_path / str(checkpointing)
        fit(unevaluated(four_steps(data, run, activation_checkpointing=checkpointing)))
        found.append(losses(run))
    assert found[0].keys() == found[1].keys()
    for step, terms in found[0].items():
        for name, value in terms.items():
            assert found[1][step][name] == pytest.approx(value, rel=LOSS, abs=LOSS), (step, name)


@simulated
def test_bfloat16_training_with_loader_processes_checkpointing_and_a_trace(data, tmp_path, caplog, monkeypatch):
    """torch_npu's own profiler runs, over a CANN that records nothing."""
    asked, context = [], devices.loader_context
    monkeypatch.setattr(devices, "loader_context", lambda *given: asked.append(given[1:]) or context(*given))
    caplog.set_level(logging.INFO, logger="groundingdino")
    config = four_steps(data, tmp_path, precision="bf16", activation_checkpointing=True, profile="2:3")
    fit(dataclasses.replace(config, data=dataclasses.replace(config.data, workers=1)))
    steps = losses(tmp_path)
    assert len(steps) == 4 and all(math.isfinite(value) for terms in steps.values() for value in terms.values())
    assert asked == [(1, "groundingdino.data.dataset"), (1, "groundingdino.evaluation.runner")]
    (trace,) = (tmp_path / "profile").rglob("trace_view.json")
    assert "aten::" in trace.read_text() and "trace of steps 2 to 2" in caplog.text
    (info,) = (tmp_path / "profile").rglob("profiler_info.json")
    assert '"_profiler_level": "Level1"' in info.read_text()  # the least that leaves a table of operators


@simulated
def test_a_loader_process_comes_from_one_that_has_never_seen_the_device(learner):
    context = devices.loader_context(learner.device, 1, "loader_facts")
    ((parent, has_torch_npu),) = DataLoader(LoaderFacts(), None, num_workers=1, multiprocessing_context=context)
    assert parent != os.getpid() and not has_torch_npu and "torch_npu" in sys.modules
    ((forked, _),) = DataLoader(LoaderFacts(), None, num_workers=1)
    assert forked == os.getpid()  # what happens without


@pytest.fixture(scope="module")
def learner() -> Learner:
    device = devices.pick_device("npu")
    devices.tune_process(device)
    devices.prepare_device(device)
    torch.manual_seed(0)
    config = small_config(Path("unused"), Path("unused"), device="npu", ema_decay=0.0)
    from groundingdino.training.criterion import Criterion

    return Learner(build_detector(config.model), Criterion(), config, device)


@simulated
def test_a_step_reads_from_the_device_twice_and_keeps_float64_off_it(learner):
    from npu_simulator.watch import Watch

    batch = float32_batch()
    learner.step([batch], 1.0)  # level sizes are copied to the device, optimizer state is made
    with Watch() as watch:
        learner.step([batch], 1.0)
    places = sorted(place.split(":")[0] for place in watch.reads.elements())
    assert places == ["training/matcher.py", "training/optimizer.py"], watch.reads  # costs, and the gradient's norm


@simulated
def test_the_runtime_sees_two_copies_to_the_host_in_a_step(learner):
    batch = float32_batch()
    learner.step([batch], 1.0)
    torch.npu.synchronize()
    before = SIMULATOR.counters()
    learner.step([batch], 1.0)
    torch.npu.synchronize()  # what is left in the task queue counts too
    after = SIMULATOR.counters()
    counts = {name: after[name] - before[name] for name in after}
    print("counters of one step:", counts)
    assert counts["to_host"] == 2 and counts["data_dependent"] == 0
    assert 500 < counts["kernels"] < 5000


@pytest.fixture(scope="module")
def asked(learner):
    """An engine on the NPU, an image as it is read, and a prompt; all sizes have been met before."""
    engine = Engine(learner.model.eval())
    image = ResizedImage(torch.randn(3, 64, 80), ImageGeometry((64, 80), (1.0, 1.0)))
    prompt = resolve(Categories(["cat", "red dog"]), default_tokenizer())
    list(engine.rank([(engine.encode_images([image])[0], engine.encode_prompts([prompt])[0])], keep=10))
    return engine, image, prompt


@simulated
def test_prediction_reads_from_the_device_only_what_it_answers(asked):
    from npu_simulator.watch import Watch

    engine, image, prompt = asked
    with Watch() as watch:
        images, prompts = engine.encode_images([image, image, image]), engine.encode_prompts([prompt])
        assert not watch.reads
        answers = list(engine.rank([(encoded, prompts[0]) for encoded in images], keep=10))
    places = {place.split(":")[0]: count for place, count in watch.reads.items()}
    assert len(answers) == 3 and places == {"runtime/devices.py": 1}, watch.reads  # the boxes of a pass, together


@simulated
def test_both_halves_and_the_detector_copy_nothing_between_host_and_device(asked):
    """So that a graph of the device can record them, for sizes that they have met before."""
    engine, image, prompt = asked
    device = engine.device
    images = to_device(collate_images([image.pixels]), device)
    text = to_device(collate_text([prompt.chunks[0].caption]), device)
    with torch.no_grad():
        for expected in (None, 0):  # the first call may still send what it keeps, such as the sizes of levels
            torch.npu.synchronize()
            before = SIMULATOR.counters()
            tokens, features = engine.model.encode_image(images), engine.model.encode_text(text)
            engine.model.detect(tokens, features, text)
            torch.npu.synchronize()
            after = SIMULATOR.counters()
            copies = {name: after[name] - before[name] for name in ("to_host", "to_device", "data_dependent")}
            assert expected is None or set(copies.values()) == {expected}, copies


@simulated
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gradient_that_is_not_finite_changes_nothing(learner, precision):
    """torch_npu's fused AdamW takes no notice of `found_inf`."""
    device = torch.device("npu", 0)
    weight = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.AdamW([weight], lr=0.1, **devices.fused_adamw(device))
    scaler = devices.grad_scaler(device, precision)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.unscale_(optimizer)
        finite_step(optimizer, scaler, weight.grad.norm())

    step(1.0)
    before = [weight.detach().cpu(), *(t.cpu() for t in optimizer.state[weight].values())]
    step(math.inf)
    after = [weight.detach().cpu(), *(t.cpu() for t in optimizer.state[weight].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    step(1.0)
    assert torch.isfinite(weight.detach().cpu()).all() and not torch.equal(weight.detach().cpu(), before[0])


@simulated
def test_the_self_check_passes(learner, capsys, monkeypatch):
    monkeypatch.delenv("GROUNDINGDINO_KERNELS", raising=False)
    monkeypatch.setattr(operator_report, "ENCODER", (((4, 5), (2, 3)), 8, 32, 4))
    assert selfcheck.main(["--device", "npu", "--repeats", "1"]) == 0
    report = capsys.readouterr().out
    assert "torch_npu" in report and "device npu:0 (Ascend910B3)" in report and "path: libopapi.so" in report
    assert report.count("  ok") == len(operator_report.CASES)


# ---- What is measured on a card is what it uses --------------------------------------------------------------------

SMALL = tuning_report.Recipe(
    images=((64, 96),), batches=(2,), queries=40, parameters=3, backbones=(BackboneConfig(24, (1,), (2,), 4, (0,)),)
)


def npu_attention(q, k, v, heads, layout, pse=None, padding_mask=None, atten_mask=None, scale=1.0, *rest, **options):
    """What torch_npu documents of its fused attention."""
    assert layout == "BNSD" and heads == q.shape[1] and pse.shape[-3:] == (heads, q.shape[2], q.shape[2])
    out = ((q @ k.mT) * scale + pse).softmax(dim=-1) @ v
    empty = q.new_empty(0)
    return out, empty, empty, empty, 0, 0, 0


@simulated
@pytest.mark.parametrize("fastest", ["aclnn", "gather"])
def test_tuning_refuses_what_is_wrong_and_training_uses_the_fastest(learner, fastest, tmp_path, monkeypatch):
    """With made-up times; gradients by gathered rows are made wrong."""
    monkeypatch.setenv("GROUNDINGDINO_CACHE", str(tmp_path))
    monkeypatch.delenv("GROUNDINGDINO_KERNELS", raising=False)
    wrong = npu.BACKWARD["gather, index_add"]
    monkeypatch.setitem(npu.BACKWARD, "gather, index_add", lambda *given: [2 * t for t in wrong(*given)])
    library = torch.library.Library("npu", "IMPL")
    library.impl("npu_fusion_attention", npu_attention, "PrivateUse1", allow_override=True)
    times = {"aclnn": 5.0, "grid_sample": 9.0, "gather": 4.0, "gather, sorted": 6.0, "gather, index_add": 1.0}
    times |= {"fused": 3.0, "foreach": 2.0, "composed": 5.0, "sdpa": 4.0, "npu_fusion_attention": 3.0}
    device = torch.device("npu", 0)
    table = tuning_report.tune(device, lambda name, call: times[name] * (fastest in name or 10), SMALL)
    print("\n".join(tuning_report.table_lines(table)))
    tuning.save_table(table, device)
    value, locations = torch.empty(1, 9, 8, 32, device=device), torch.empty(1, 9, 8, 1, 4, 2, device=device)
    forward, backward = (npu.formulation(direction, value, locations) for direction in ("forward", "backward"))
    assert (forward, backward) == (("aclnn", "aclnn") if fastest == "aclnn" else ("gather", "gather, sorted"))
    assert "wrong by" in table.operations["ms_deform_attn backward, decoder"].refused["gather, index_add"]
    assert adamw_options(device) == {"foreach": True} and adamw_options(torch.device("cpu")) == {"fused": True}
    assert tuning.choice(device, "window_attention inference, 16 places") == "npu_fusion_attention"
    learner.step([float32_batch()], 1.0)  # with what was chosen
    monkeypatch.setenv("GROUNDINGDINO_KERNELS", "off")
    assert npu.formulation("forward", value, locations) == "grid_sample"
    tuning.save_table(Table({}, {}), device)  # for the tests after this one: nothing is chosen


# ---- What a card has fused, against what it fuses ------------------------------------------------------------------


@simulated
def test_the_composite_on_the_device_equals_the_operator_and_takes_what_it_cannot(learner, monkeypatch):
    torch.manual_seed(0)
    shapes = ((4, 5), (2, 3))
    for channels, backend in ((8, "off"), (264, "auto")):
        value = torch.randn(1, 26, 2, channels)
        locations, weights = torch.rand(1, 7, 2, 2, 4, 2), torch.rand(1, 7, 2, 2, 4)
        expected = ms_deform_attn_reference(value, shapes, locations, weights)
        monkeypatch.setenv("GROUNDINGDINO_KERNELS", backend)
        inputs = [t.npu().requires_grad_() for t in (value, locations, weights)]
        found = ms_deform_attn(inputs[0], shapes, inputs[1], inputs[2])
        found.sum().backward()
        torch.testing.assert_close(found.detach().cpu(), expected, rtol=1e-5, atol=1e-5)
        assert all(torch.isfinite(t.grad.cpu()).all() for t in inputs)


@simulated
def test_fused_adamw_takes_the_steps_of_the_plain_one(learner):
    device = torch.device("npu", 0)
    torch.manual_seed(0)
    start, gradients, ends = torch.randn(7, 5), torch.randn(3, 7, 5), []
    for options in (devices.fused_adamw(device), {"foreach": False}):
        weight = torch.nn.Parameter(start.to(device))
        optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1, **options)
        for gradient in gradients:
            weight.grad = gradient.to(device)
            optimizer.step()
        ends.append(weight.detach().cpu())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


# ---- The simulator refuses what a card refuses ---------------------------------------------------------------------


@pytest.fixture
def refused() -> Iterator[Callable]:
    def check(call: Callable, why: str) -> None:
        with pytest.raises(RuntimeError, match=f"simulated NPU: .*{why}"):
            call()

    yield check


@simulated
def test_a_tensor_of_the_cpu_beside_one_of_the_npu_is_refused(refused):
    x = torch.ones(3, device="npu")
    refused(lambda: x + torch.ones(3), "a tensor on the cpu beside tensors on the NPU")
    refused(lambda: torch.cat([x, torch.ones(3)]), "a tensor on the cpu")
    refused(lambda: x.masked_fill(torch.ones(3, dtype=torch.bool), 0), "a tensor on the cpu")
    assert (x + torch.tensor(2.0)).tolist() == [3, 3, 3]  # a number is no tensor
    assert x[torch.tensor([0, 2])].tolist() == [1, 1]  # indices may come from the host


@simulated
def test_float64_and_integer_products_and_nine_dimensions_are_refused(refused):
    x = torch.ones(2, 2, device="npu")
    refused(lambda: torch.zeros(2, dtype=torch.float64, device="npu"), "the device has no Double")
    refused(lambda: x.sum(dtype=torch.float64), "the device has no Double")
    refused(lambda: x.long() @ x.long(), "the device multiplies no integers")
    refused(lambda: torch.ones(1, device="npu").view((1,) * 9) + 1, "at most 8 dimensions")


@simulated
def test_an_operator_without_a_kernel_on_the_npu_is_told(capfd):
    torch.linalg.cholesky(torch.eye(3, device="npu"))
    assert NO_KERNEL in capfd.readouterr().err


@simulated
def test_a_copy_to_the_host_that_nobody_waited_for_is_garbage():
    x = torch.arange(5, device="npu")
    early = x.to("cpu", non_blocking=True)
    seen = early.tolist()
    torch.npu.synchronize()
    assert early.tolist() == [0, 1, 2, 3, 4] and seen != early.tolist()


@simulated
def test_the_memory_of_the_card_ends():
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.empty(1 << 40, dtype=torch.uint8, device="npu")


@simulated
def test_random_numbers_follow_the_npus_generator_and_leave_the_cpus_alone():
    device = torch.device("npu", 0)
    state, host = devices.random_state(device), torch.get_rng_state()
    draws = [torch.rand(4, device="npu").tolist(), torch.nn.functional.dropout(torch.ones(64, device="npu")).tolist()]
    assert torch.equal(host, torch.get_rng_state())
    after = torch.rand(4, device="npu").tolist()
    devices.set_random_state(device, state)
    again = [torch.rand(4, device="npu").tolist(), torch.nn.functional.dropout(torch.ones(64, device="npu")).tolist()]
    assert draws == again and torch.rand(4, device="npu").tolist() == after != draws[0]


# ---- The runs of the above in subprocesses -------------------------------------------------------------------------


def start(arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1", **variables}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": HERE.parent}
    return subprocess.Popen([sys.executable, *arguments], env=env, **options)


def two_ranks(data: Path, run: Path, condition: str, **variables: str) -> list[subprocess.Popen[str]]:
    """Two ranks that train without a launcher; `condition` is the second one's (see training_runs)."""
    script = [str(HERE / "npu_simulator" / "run.py"), str(HERE / "training_runs.py"), str(data), str(run), condition]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "KILL_RANK": "1"}
    common |= {"FAKE_CANN_DEVICES": "2", "FAKE_HCCL_TIMEOUT_S": "20", "TEST_DEVICE": "npu", **variables}
    return [start(script, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Exit code and output of this file's tests on the simulator, of two ranks, and of the first where one is lost."""
    from fake_cann import build

    if build.missing_compiler():
        pytest.skip(build.missing_compiler())
    try:
        build.torch_npu_folder()
    except RuntimeError as error:
        pytest.skip(str(error))
    build.fake_cann(), build.npu_binding(), build.simulator()
    folder = tmp_path_factory.mktemp("ranks")
    tests = ["-m", "pytest", "-p", "npu_simulator.simulator", "-p", "no:cacheprovider", "-rP", __file__]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master-port={free_port()}"]
    script = [str(HERE / "npu_simulator" / "ranks.py"), str(folder)]
    processes = {
        "tests": start(tests),
        "ranks": start([*launch, *script], FAKE_CANN_DEVICES="2", FAKE_HCCL_TIMEOUT_S="30"),
    }
    data = scenes(folder / "scenes")
    lost = {
        "killed": two_ranks(data, folder / "killed", "step:3:SIGKILL"),
        "link": two_ranks(data, folder / "link", "never", FAKE_HCCL_LINK_FAILS_AFTER="6"),
    }
    processes |= {name: first for name, (first, _) in lost.items()}
    outputs = {name: process.communicate(timeout=500)[0] for name, process in processes.items()}
    for _, second in lost.values():
        second.communicate(timeout=60)
    return {name: (processes[name].returncode, output) for name, output in outputs.items()}


@pytest.mark.skipif(SIMULATOR is not None, reason="this is the subprocess")
def test_everything_above_passes_on_the_simulated_npu(runs):
    code, output = runs["tests"]
    assert code == 0, output[-6000:]
    assert " passed" in output and " failed" not in output and NO_KERNEL not in output, output[-3000:]
    assert "Call start failed" not in output  # torch_npu's profiler


@pytest.mark.skipif(SIMULATOR is not None, reason="this is the subprocess")
def test_two_ranks_over_hccl_average_gradients_and_train_the_quick_start(runs):
    code, output = runs["ranks"]
    assert code == 0, output[-6000:]
    assert "gradients equal those of one process" in output
    assert "4 images per step (2 x 1 x 2 processes)" in output and "precision@1" in output, output[-3000:]


@pytest.mark.skipif(SIMULATOR is not None, reason="this is the subprocess")
def test_a_killed_rank_is_named_once_hccl_has_waited_for_it(runs):
    code, output = runs["killed"]
    assert code == 2, output[-6000:]
    assert "\nprocess 1 of 2 has ended; look for its own message" in output


@pytest.mark.skipif(SIMULATOR is not None, reason="this is the subprocess")
def test_a_dead_link_between_ranks_that_run_is_one_line_that_names_the_rank(runs):
    code, output = runs["link"]
    assert code == 2, output[-6000:]
    assert "\nprocess 0 of 2 cannot exchange with the others, all of which run" in output
    assert "(fake HCCL: the link is down), and go on with --resume auto\n" in output
