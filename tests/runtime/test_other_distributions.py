"""Another distribution that installs a package `groundingdino` is named in one line."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from groundingdino.runtime import other_distributions

ROOT = Path(__file__).parents[2]


def install(folder: Path, name: str, owned: str) -> None:
    """A distribution whose record holds one file."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "RECORD").write_text(f"{owned},sha256=abc,1\n{name}-1.0.dist-info/METADATA,,\n")


@pytest.mark.parametrize("name", ["groundingdino_py", "rf_groundingdino", "groundeddino_vl", "groundingdino_gml"])
def test_a_distribution_that_owns_files_of_the_package_is_found(tmp_path: Path, name: str) -> None:
    install(tmp_path, name, "groundingdino/models/__init__.py")
    assert other_distributions.owners([str(tmp_path)]) == [name.replace("_", "-")]


def test_ours_and_those_that_only_sound_alike_are_not(tmp_path: Path) -> None:
    install(tmp_path, "groundingdino", "groundingdino/__init__.py")
    install(tmp_path, "autodistill_grounding_dino", "autodistill_grounding_dino/__init__.py")
    install(tmp_path, "numpy", "groundingdino/not_looked_at.py")
    assert other_distributions.owners([str(tmp_path), "no such folder", ""]) == []


def test_the_import_says_which_to_uninstall_in_one_line(tmp_path: Path) -> None:
    install(tmp_path, "rf_groundingdino", "groundingdino/version.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, "-m", "groundingdino", "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert "pip uninstall rf-groundingdino" in line


def test_looking_takes_less_than_20_milliseconds() -> None:
    start = time.process_time()
    other_distributions.warning()
    assert time.process_time() - start < 0.02
