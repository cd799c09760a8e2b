"""The limits of a case find what computes or waits without end, and nothing else."""

import contextlib
import subprocess
import sys
import time

import pytest
from fuzz.fuzzing import limits

SPIN = "while True: pass"


def test_a_case_that_computes_too_long_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="no end"), limits(seconds=0.2):
        exec(SPIN)


def test_a_case_that_waits_too_long_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="no end"), limits(patience=0.2):
        time.sleep(30)


def test_a_case_that_waits_for_a_process_that_computes_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="no end"), limits(patience=0.2):
        subprocess.run([sys.executable, "-c", SPIN])
    with pytest.raises(AssertionError, match="no end"), limits(seconds=0.2):
        subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)


def test_a_case_that_catches_what_ends_it_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="no end"), limits(seconds=0.2):
        with contextlib.suppress(Exception):
            exec(SPIN)


def test_a_case_that_only_waits_for_the_processor_is_none() -> None:
    with limits(seconds=0.2):
        time.sleep(0.5)
