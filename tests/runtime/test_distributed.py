"""The collectives, in one process and in two over gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import free_port

from groundingdino.runtime import distributed

ROOT = Path(__file__).parent.parent.parent

TWO_RANKS = """
import torch
from groundingdino.runtime import distributed as d
world = d.init("cpu", timeout_minutes=1)
assert (world.rank, world.size) == (d.rank(), 2) and world.local_rank == world.rank and world.device.type == "cpu"
assert d.is_main() == (world.rank == 0) and d.world_size() == 2
mine = torch.tensor([1.0, 2.0]) * (world.rank + 1)
assert d.all_reduce_sum(mine).tolist() == [3.0, 6.0]
assert mine.tolist() == [world.rank + 1.0, 2 * world.rank + 2.0]
assert d.gather_objects({"rank": world.rank}) == [{"rank": 0}, {"rank": 1}]
assert d.broadcast_object(f"from {world.rank}") == "from 0"
assert d.init("cpu").size == 2  # a second call joins no second group
d.barrier()
d.shutdown()
assert d.world_size() == 1
print("done")
"""

ONE_DIES = """
import os, torch
from groundingdino.runtime import distributed as d
world = d.init("cpu", timeout_minutes=1)
if world.rank == 1:
    os._exit(7)
try:
    d.all_reduce_sum(torch.ones(1))
except d.ProcessLostError as error:
    print(error, flush=True)
    os._exit(0)
"""


ONE_TAKES_LONG = """
import os, time, torch
from groundingdino.runtime import distributed as d
world = d.init("cpu", timeout_minutes=1)
d.barrier()
for _ in range(8 if world.rank == 1 else 0):  # as an evaluation with many images on one rank
    time.sleep(0.6)
    d.note_progress()
d.wait_for_others(patience=2.5)
print("together", flush=True)
if world.rank == 1:
    time.sleep(9)  # without a sign of work
    os._exit(0)
try:
    d.wait_for_others(patience=2.5)
except d.ProcessLostError as error:
    print(error)
"""

ONE_DIES_WHILE_OTHERS_WAIT = """
import os, torch
from groundingdino.runtime import distributed as d
world = d.init("cpu", timeout_minutes=1)
d.barrier()
if world.rank == 1:
    os._exit(7)
try:
    d.gather_objects(1)
except d.ProcessLostError as error:
    print(error)
"""


EVALUATION_LONGER_THAN_THE_TIME_OUT = """
import time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from PIL import Image
from training_runs import SMALL
from groundingdino.evaluation.annotation_file import ImageFile
from groundingdino.evaluation.runner import EvaluationOptions, Question, evaluate
from groundingdino.inference.prompts import Referring
from groundingdino.model import build_detector
from groundingdino.runtime import distributed as d
world = d.init("cpu", timeout_minutes=1)
dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2))  # an exchange may take no longer from now on
d._patience = 4.0  # seconds without a sign of work
files = [Path(FOLDER) / f"{number}.png" for number in range(12)]
if world.rank == 0:
    for file in files:
        Image.new("RGB", (32, 32)).save(file)
d.barrier()
class Slow:
    def questions(self):
        return [Question(ImageFile(file), (Referring("a cat"),), (n,)) for n, file in enumerate(files)]
    def score(self, answers):  # the main process alone
        return [time.sleep(0.6) or answer.image_id for answer in answers]
model = build_detector(SMALL)
wait = lambda prompts: time.sleep(1.1 * world.rank)  # the other one alone
found = evaluate(model, Slow(), EvaluationOptions(scale=(32, 32), workers=0), progress=wait)
assert sorted(found.figures) == list(range(12)) and found.seconds > 10
print("figures on both", flush=True)
"""


def run_ranks(code: str, size: int = 2) -> list[tuple[int, str]]:
    """Exit code and output of each of `size` processes started as torchrun would start them."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    common |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(size):
        env = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", code], env=env, **options))
    outputs = [process.communicate(timeout=120)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def test_two_ranks_reduce_gather_and_broadcast():
    for code, output in run_ranks(TWO_RANKS):
        assert code == 0 and output.strip().endswith("done"), output


def test_a_rank_that_dies_ends_the_others_with_an_error():
    (code, output), (dead, _) = run_ranks(ONE_DIES)
    assert dead == 7
    assert code == 0 and "process 1 of 2 has ended" in output, output


def test_a_single_process_needs_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = distributed.init("cpu")
    assert world == distributed.World(0, 0, 1, torch.device("cpu"))
    value = torch.tensor([1, 2])
    total = distributed.all_reduce_sum(value)
    assert total.tolist() == [1, 2] and total.data_ptr() != value.data_ptr()
    assert distributed.gather_objects("x") == ["x"] and distributed.broadcast_object("x") == "x"
    assert distributed.is_main() and distributed.rank() == 0 and distributed.world_size() == 1
    distributed.barrier()
    distributed.shutdown()


def test_whoever_works_long_is_waited_for_and_whoever_shows_nothing_is_named():
    (code, output), (_, other) = run_ranks(ONE_TAKES_LONG)
    assert code == 0 and "together" in other
    *_, before, last = output.splitlines()
    assert before == "together" and last.startswith("process 1 of 2 did not answer in time; look for its own message")
    assert last.endswith("go on with --resume auto")


def test_whoever_ends_while_others_wait_is_named_at_once():
    (code, output), _ = run_ranks(ONE_DIES_WHILE_OTHERS_WAIT)
    assert code == 0 and "process 1 of 2 has ended" in output


@pytest.mark.slow
def test_an_evaluation_and_a_scoring_longer_than_the_time_out_of_an_exchange_kill_nobody(tmp_path):
    for code, output in run_ranks(EVALUATION_LONGER_THAN_THE_TIME_OUT.replace("FOLDER", repr(str(tmp_path)))):
        assert code == 0 and output.strip().endswith("figures on both"), output
