"""What a run writes down about itself."""

import subprocess
from pathlib import Path

import pytest
import torch

from groundingdino.runtime.distributed import World
from groundingdino.training import run_folder

WORLD = World(0, 0, 1, torch.device("cpu"))


def git(folder: Path, *arguments: str) -> str:
    own = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false")
    command = ["git", "-C", str(folder), *own, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_revision_is_the_commit_also_where_it_has_a_tag_and_says_if_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "module.py"))
    assert run_folder.describe_environment(WORLD)["revision"] is None
    (tmp_path / "module.py").write_text("1")
    for step in (("init", "-q"), ("add", "module.py"), ("commit", "-qm", "first"), ("tag", "-a", "v1", "-m", "v1")):
        git(tmp_path, *step)
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert run_folder.describe_environment(WORLD)["revision"] == commit
    (tmp_path / "module.py").write_text("2")
    assert run_folder.describe_environment(WORLD)["revision"] == f"{commit}-dirty"
