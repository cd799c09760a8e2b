"""Threads follow the free cores; what other programs use is made up here."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_cases import tiny_model

from groundingdino.inference.engine import Engine
from groundingdino.inference.prompts import Referring, resolve
from groundingdino.inputs.images import ImageGeometry, ResizedImage
from groundingdino.inputs.text import default_tokenizer
from groundingdino.runtime import bootstrap, threads

GEOMETRY = ImageGeometry((64, 64), (1.0, 1.0))
ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc")


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    threads._governor = None


class Machine:
    """A clock and processors that tests turn on."""

    def __init__(self, monkeypatch):
        self.usage = threads.Usage(100.0, 1000.0, 10.0)
        monkeypatch.setattr(threads.time, "monotonic", lambda: self.usage.clock)

    def passes(self, seconds, others, own):
        """So many cores are used meanwhile."""
        now = self.usage
        spent = (others + own) * seconds
        self.usage = threads.Usage(now.clock + seconds, now.all + spent, now.own + own * seconds)


@pytest.mark.parametrize(("most", "others", "expected"), [(2, 0.1, 2), (2, 0.67, 1), (2, 5.0, 1), (8, 2.9, 5)])
def test_torch_keeps_to_the_cores_that_others_leave_and_takes_them_back(most, others, expected, monkeypatch):
    machine = Machine(monkeypatch)
    governor = threads.ThreadGovernor(most, lambda: machine.usage)
    machine.passes(threads.INTERVAL, others, own=1.3)
    governor.adjust()
    assert torch.get_num_threads() == expected
    machine.passes(threads.INTERVAL, others=0.2, own=expected)
    governor.adjust()
    assert torch.get_num_threads() == most


def test_a_moment_decides_nothing(monkeypatch):
    machine = Machine(monkeypatch)
    governor = threads.ThreadGovernor(2, lambda: machine.usage)
    machine.passes(threads.INTERVAL / 2, others=2, own=0)
    governor.adjust()
    assert torch.get_num_threads() == 2


def test_the_engine_asks_before_each_prompt_each_image_and_each_pass(monkeypatch):
    asked = []
    monkeypatch.setattr(threads, "adjust", lambda: asked.append(1))
    engine = Engine(tiny_model())
    (prompt,) = engine.encode_prompts([resolve(Referring("a cat"), default_tokenizer())])
    (image,) = engine.encode_images([ResizedImage(torch.randint(0, 256, (3, 64, 64)).byte(), GEOMETRY)])
    assert len(asked) == 2
    list(engine.rank([(image, prompt)], keep=1))
    assert len(asked) == 3


@linux
def test_a_users_number_of_threads_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads.follow_free_cores()
    assert threads._governor is None
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "allowed_cores", lambda: 2)
    threads.follow_free_cores()
    assert threads._governor is not None


@pytest.mark.parametrize(("text", "cores"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", None)])
def test_a_containers_limit_counts_as_whole_cores(text, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    assert threads.allowed_cores() == threads.os.cpu_count()
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert threads.allowed_cores() == (cores or threads.os.cpu_count())


@linux
def test_what_a_process_uses_is_not_counted_as_others():
    before = threads.usage()
    while threads.usage().own - before.own < 0.2:
        pass
    after = threads.usage()
    assert after.all - before.all > 0.1
    assert after.own - before.own <= after.all - before.all + 0.05


def test_programs_let_threads_wait_briefly_and_a_user_decides(monkeypatch):
    for name in (bootstrap.SPIN_COUNT, bootstrap.WAIT_POLICY):
        monkeypatch.delenv(name, raising=False)
    bootstrap.wait_briefly()
    assert bootstrap.SPIN_COUNT not in bootstrap.os.environ  # torch is here already
    probe = (
        "import os; from groundingdino.cli import console; "
        "console.run('x', lambda: print(os.environ.get('GOMP_SPINCOUNT')) or 0)"
    )

    def printed(**environment):
        given = {name: value for name, value in bootstrap.os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, "-c", probe],
            env=given | {"PYTHONPATH": str(ROOT)} | environment,
            text=True,
            capture_output=True,
        )
        return done.stdout.strip()

    assert printed() == bootstrap.BRIEF
    assert printed(GOMP_SPINCOUNT="7") == "7"
    assert printed(OMP_WAIT_POLICY="active") == "None"
