"""What happens to files, memory and the clock while a run is under way: one line, and the last state as it was."""

import dataclasses
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from training_runs import assert_same_end, scenes, small_config

from groundingdino.checkpoints import run_state
from groundingdino.config import TrainConfig
from groundingdino.data.convert import convert
from groundingdino.training.stop import StopRequest
from groundingdino.training.trainer import fit


class Meanwhile(StopRequest):
    """Does something when it is asked for the n-th time whether to end, and never wants to."""

    def __init__(self, question: int, deed: Callable[[], object]) -> None:
        super().__init__()
        self.left, self.deed = question, deed

    def reason(self) -> str | None:
        self.left -= 1
        if self.left == 0:
            self.deed()
        return None


def refused_line(config: TrainConfig, question: int, deed: Callable[[], object]) -> str:
    """What a run says that ends after `deed` was done."""
    with pytest.raises((ValueError, OSError)) as end:
        fit(config, stop=Meanwhile(question, deed))
    assert str(end.value).isprintable()
    return str(end.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's; see console
def test_a_run_folder_that_is_deleted_ends_the_run_in_one_line(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = refused_line(small_config(data, run), 2, lambda: shutil.rmtree(run))
    assert "No such file or directory" in said and str(run) in said


def test_a_run_folder_that_becomes_read_only_keeps_its_state(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, original = tmp_path / "run", os.open

    def refuse(path: str, flags: int, *rest: int, **options: int) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(run)):
            raise PermissionError(13, "Permission denied")
        return original(path, flags, *rest, **options)

    # A test may run as root, who may write anywhere: the system's answer is made up.
    said = refused_line(small_config(data, run), 5, lambda: monkeypatch.setattr(os, "open", refuse))
    assert said.endswith("last.state (Permission denied); what is there is as it was")
    assert run_state.load_state(run / "last.state")["position"]["step"] == 3


def test_an_image_that_changes_is_named(tmp_path: Path) -> None:
    data = scenes(tmp_path / "data")
    photos = {photo: photo.read_bytes() for photo in (data / "train2014").glob("*.jpg")}

    def resize() -> None:
        for photo in photos:
            Image.new("RGB", (20, 30)).save(photo)

    said = refused_line(small_config(data, tmp_path / "resized"), 2, resize)
    assert "is 20x30, annotated for 64x64: boxes would be off" in said and "train2014" in said

    def cut() -> None:
        for photo, content in photos.items():
            photo.write_bytes(content[:300])

    for photo, content in photos.items():
        photo.write_bytes(content)
    assert "not a readable image" in refused_line(small_config(data, tmp_path / "cut"), 2, cut)


def test_an_annotation_file_that_changes_is_named(tmp_path: Path) -> None:
    data, lines = scenes(tmp_path / "data"), tmp_path / "data" / "train.jsonl"
    convert(data / "mdetr_annotations" / "finetune_refcoco_train.json", lines, "odvg")
    config = small_config(data, tmp_path / "run")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train_files=("train.jsonl",)))

    def swap_two_lines() -> None:
        first, second, *rest = lines.read_text().splitlines()
        lines.write_text("\n".join([second, first, *rest]) + "\n")

    said = refused_line(config, 2, swap_two_lines)
    assert f"{lines}: changed since it was opened" in said


def test_a_clock_that_is_set_back_changes_nothing(
    data: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    fit(
        small_config(data, tmp_path / "run"),
        stop=Meanwhile(3, lambda: monkeypatch.setattr(time, "time", lambda: now() - 86_400)),
    )
    assert_same_end(tmp_path / "run", uninterrupted)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_too_few_file_descriptors_are_one_line(data: Path, tmp_path: Path) -> None:
    config = small_config(data, tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def leave_none() -> None:
        lowest = os.open("/dev/null", os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))

    try:
        said = refused_line(config, 2, leave_none)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "Too many open files" in said


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_under_the_logs_ends_the_run_in_one_line_with_its_state(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:  # files may not grow beyond this, which root cannot get round either
        resource.setrlimit(resource.RLIMIT_FSIZE, ((run / "metrics.jsonl").stat().st_size, limits[1]))

    try:
        said = refused_line(small_config(data, run, log=("tensorboard",)), 5, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert said.endswith(f"could not write {run / 'metrics.jsonl'} (File too large)")
    assert run_state.load_state(run / "last.state")["position"]["step"] == 3
