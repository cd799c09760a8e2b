"""A model and a data set so small that a training step takes milliseconds, and runs of them."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from groundingdino.checkpoints import run_state, safetensors_file
from groundingdino.config import BackboneConfig, DataConfig, ModelConfig, OptimizerConfig, TextConfig, TrainConfig
from groundingdino.data.synthetic import SyntheticConfig
from groundingdino.data.synthetic_refcoco import write_dataset
from groundingdino.runtime import distributed
from groundingdino.training.criterion import Criterion
from groundingdino.training.learner import Learner
from groundingdino.training.nonfinite import NonFiniteLossError
from groundingdino.training.stop import RunStopped, StopRequest, stop_on_signals
from groundingdino.training.trainer import fit
from groundingdino.training.validation import Assessor

SMALL = ModelConfig(
    name="small",
    backbone=BackboneConfig(8, (1, 1, 1, 1), (1, 1, 2, 2), 4, drop_path_rate=0.2),
    text=TextConfig(16, 1, 2, 32),
    width=64,
    num_heads=4,
    ffn_width=32,
    text_layer_heads=2,
    text_layer_ffn_width=32,
    fusion_width=32,
    fusion_heads=2,
    fusion_dropout=0.2,
    enhancer_layers=1,
    decoder_layers=2,
    num_queries=12,
    num_denoising=4,
)
TIMEOUT = float(os.environ.get("TEST_TIMEOUT", "60"))  # seconds for a collective
LAST_STEP = 16  # of `small_config`
REPOSITORY = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def scenes(root: Path) -> Path:
    """A rendered data set: 16 captions of one or two objects to train on, 2 scenes in each other split."""
    write_dataset(
        root,
        SyntheticConfig(train_scenes=16, heldout_scenes=2, train_sentences=(1, 2), heldout_sentences=2, image_size=64),
    )
    return root


def small_config(data: Path, run: Path, **changes: Any) -> TrainConfig:
    """Two epochs of 8 steps with 2 images; drop path, dropout, denoising and augmentation are all random."""
    sources = DataConfig(
        root=data,
        evaluation=(("val", "mdetr_annotations/finetune_refcoco_val.json"),),
        batch_size=2,
        workers=0,
        train_sides=(48, 56, 64),
        crop_from_sides=(64,),
        crop_sides=(40, 60),
        evaluation_side=48,
    )
    config = TrainConfig(
        SMALL, sources, OptimizerConfig(lr=1e-3, scale_lr=False), run_dir=run, epochs=2, save_every=3, log_every=2,
        activation_checkpointing=False, device="cpu", ema_decay=0.9, pictures=0,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def losses(run: Path) -> dict[int, dict[str, float]]:
    """step -> every loss term, learning rate and gradient norm that a run has written down."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert len({row["step"] for row in steps}) == len(steps), "a step is written down twice"
    return {row["step"]: {k: v for k, v in row.items() if k not in ("images_per_second", "seconds")} for row in steps}


def assert_same_end(run: Path, reference: Path) -> None:
    """The same figures at every step, the same weights, optimizer, average, random states, and best checkpoint."""
    assert losses(run) == losses(reference)
    for name in ("final.safetensors", "best.safetensors"):
        ours, theirs = load_file(run / name), load_file(reference / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    ours, theirs = load_file(run / "last.state"), load_file(reference / "last.state")
    assert ours.keys() == theirs.keys() and any("average" in key for key in ours)
    differ = {key for key in ours if not torch.equal(ours[key], theirs[key])}
    assert differ <= {"groundingdino.checksum"}  # covers the config too, and so the name of the folder
    a, b = run_state.load_state(run / "last.state"), run_state.load_state(reference / "last.state")
    assert a["position"] == b["position"] and a["loader"] == b["loader"]
    assert a["random"][0]["python"] == b["random"][0]["python"]


def kill_when(condition: str) -> None:
    """Let this process kill itself, as kill -9 does, at a moment: "step:N", "save:N", "evaluation:N" or "never".

    "slow:N" and "nan:N" kill nothing: the first checkpoint takes N seconds longer, the N-th loss is not finite.
    A step counts from the start of the process; "save:N" dies half way through writing the N-th checkpoint, where no
    public door leads. A third part names another signal: "step:N:SIGUSR1".
    """
    kind, number, name_of_signal = (*condition.split(":"), "", "")[:3]
    sent = signal.Signals[name_of_signal or "SIGKILL"]
    places = {
        "step": (Learner, "step"),
        "save": (safetensors_file, "_bytes_of"),
        "evaluation": (Assessor, "assess"),
    }
    if kind == "never":
        return
    if kind == "slow":
        make_saving_slow(float(number))
        return
    if kind == "nan":
        make_loss_bad(int(number))
        return
    owner, name = places[kind]
    original, calls = getattr(owner, name), [0]
    due = int(number)

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == due and "SIGNAL_PARENT" in os.environ:
            os.kill(os.getppid(), sent)  # the launcher, which passes it on to every process
            time.sleep(2)
        elif calls[0] == due:
            os.kill(os.getpid(), sent)
        return original(*arguments, **options)

    setattr(owner, name, counted)


def make_saving_slow(seconds: float) -> None:
    """As on a slow disk: the first tensors that are written take a second each."""
    original, left = safetensors_file._bytes_of, [seconds]

    def slow(tensor: torch.Tensor) -> memoryview:
        if left[0] > 0:
            left[0] -= 1
            time.sleep(1)
        return original(tensor)

    safetensors_file._bytes_of = slow


def make_loss_bad(number: int) -> None:
    """The loss of one micro-batch of this process is NaN."""
    original, calls = Criterion.forward, [0]

    def forward(self: Criterion, *arguments: Any) -> dict[str, torch.Tensor]:
        calls[0] += 1
        terms = original(self, *arguments)
        return terms if calls[0] != number else {name: term * torch.nan for name, term in terms.items()}

    Criterion.forward = forward


def main(data: str, run: str, condition: str) -> None:
    """Train until the end or until killed: python training_runs.py DATA RUN CONDITION."""
    torch.set_num_threads(1)
    once = Path(run).with_suffix(".killed")
    if os.environ.get("RANK", "0") == os.environ.get("KILL_RANK", "0") and not once.exists():
        if "KILL_RANK" in os.environ:
            once.touch()  # after torchrun's restart it lives
        kill_when(condition)
    config = small_config(Path(data), Path(run), resume="auto", device=os.environ.get("TEST_DEVICE", "cpu"))
    world = distributed.init(config.device, timeout_minutes=TIMEOUT / 60)
    request = StopRequest()
    code = 0
    with stop_on_signals(request):
        try:
            fit(config, world, request)
        except (RunStopped, OSError, NonFiniteLossError) as error:
            print(error, flush=True)
            code = 75 if isinstance(error, RunStopped) else 2
    distributed.shutdown()
    sys.exit(code)


def start(data: Path, run: Path, condition: str) -> int:
    """`main` in a process of its own; its exit code, -9 where it was killed, 75 where it was stopped."""
    command = [sys.executable, str(Path(__file__)), str(data), str(run), condition]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert found.returncode in (0, 75, -signal.SIGKILL), found.stderr
    return found.returncode


def environment() -> dict[str, str]:
    """For processes that import the library and the tests' helpers."""
    paths = f"{REPOSITORY}{os.pathsep}{Path(__file__).parent}"
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def obey_ctrl_c() -> None:
    """For a new process: one whose tests a shell runs behind "&" would ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    main(*sys.argv[1:])
