"""Two processes learn what one learns."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gradient_ranks import CASES
from safetensors.torch import load_file
from torch import Tensor
from training_runs import REPOSITORY, free_port

GRADIENT_TOLERANCE = 1e-6  # of a parameter's largest entry; computed in float64, but for some geometry in float32

Gradients = dict[str, Tensor]


def gradients(out: Path, processes: int) -> Gradients:
    """`case/parameter` -> gradient, from so many processes over gloo."""
    tests = Path(__file__).parent.parent
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    common |= {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tests}"}
    started = []
    for rank in range(processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)} if processes > 1 else {}
        command = [sys.executable, str(tests / "gradient_ranks.py"), str(out)]
        started.append(
            subprocess.Popen(
                command, env={**os.environ, **common, **ranks}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    outputs = [process.communicate(timeout=240)[0].decode() for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    return load_file(out)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gradients, Gradients]:
    folder = tmp_path_factory.mktemp("gradients")
    return gradients(folder / "one.safetensors", 1), gradients(folder / "two.safetensors", 2)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_and_micro_batches_give_the_gradients_of_one_batch(
    case: str, both: tuple[Gradients, Gradients]
) -> None:
    one, two = ({k: v for k, v in found.items() if k.startswith(f"{case}/")} for found in both)
    assert one.keys() == two.keys() and len(one) > 100
    for name, expected in one.items():
        assert torch.isfinite(expected).all()
        limit = GRADIENT_TOLERANCE * expected.abs().max().item() + 1e-15
        assert (two[name] - expected).abs().max().item() <= limit, name


def test_gradients_exchanged_in_bfloat16_are_rounded_to_it(both: tuple[Gradients, Gradients]) -> None:
    rounded = {k.split("/")[1]: v for k, v in both[1].items() if k.startswith("bfloat16/")}
    assert len(rounded) > 150
    for name, gradient in rounded.items():
        exact = both[1][f"one object each/{name}"]
        assert torch.equal(gradient, gradient.bfloat16().double()), name
        # Each half is rounded once, and so is their sum.
        assert (gradient - exact).abs().max() <= 2**-7 * exact.abs().max() * 2, name


def test_gradients_differ_between_the_cases(both: tuple[Gradients, Gradients]) -> None:
    sizes = dict.fromkeys(CASES, 0.0)
    for key, gradient in both[0].items():
        if key.split("/")[0] in CASES:
            sizes[key.split("/")[0]] += gradient.norm().item()
    assert len({f"{size:.6g}" for size in sizes.values()}) == len(CASES)
