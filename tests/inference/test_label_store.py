"""A run on disk: claimed once, gone on from, never half a record."""

import json
import os
import subprocess
import sys

import pytest

from groundingdino.inference import label_store
from groundingdino.inference.image_source import ImageRef
from groundingdino.inference.label_store import Collector, LabelRun, Record, read_records

ASKED = {"prompts": ["cat"], "least score": 0.05}


def begin(folder, images=10, shard_size=4, asked=ASKED):
    return LabelRun.create(
        folder, asked, lambda: (ImageRef(f"{n}.png", f"/{n}.png") for n in range(images)), shard_size
    )


def everything(run):
    return [(ref.name, record.position) for ref, record in run.results()]


def finish_all(run):
    for shard in run.claimed(range(3)):
        for position, _ in shard.waiting:
            shard.claim.append(Record(position, 8, 8))
        run.finish(shard)


def test_every_image_has_one_record_in_the_order_of_the_list(tmp_path):
    run = begin(tmp_path)
    assert run.done_images() == 0
    finish_all(run)
    assert everything(run) == [(f"{n}.png", n) for n in range(10)] and run.done_images() == 10
    assert [record.position for _, record in run.results(start=7)] == [7, 8, 9]
    assert not list(run.claimed(range(3)))


def test_a_claimed_shard_is_nobody_elses(tmp_path, monkeypatch):
    first = next(begin(tmp_path).claimed(range(3)))
    monkeypatch.setattr(os, "getpid", lambda: os.getppid())  # another process of this host, which lives
    others = [shard.number for shard in begin(tmp_path).claimed(range(3))]
    assert first.number == 0 and others == [1, 2]


def test_the_images_of_a_process_that_died_are_gone_on_with(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from groundingdino.inference.label_store import *\n"
        "run = LabelRun(Path(sys.argv[1])); shard = next(run.claimed([0]))\n"
        "[shard.claim.append(Record(p, 8, 8)) for p, _ in shard.waiting[:2]]; os.kill(os.getpid(), 9)"
    )
    begin(tmp_path)
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == -9
    run = begin(tmp_path)
    shard = next(run.claimed([0]))
    assert [position for position, _ in shard.waiting] == [2, 3] and shard.claim.path.name == "000000.1"


def test_a_claim_that_was_not_renewed_for_long_is_void_and_its_late_records_do_no_harm(tmp_path, monkeypatch):
    slow, other = begin(tmp_path), begin(tmp_path)
    shard = next(slow.claimed([0]))
    shard.claim.append(Record(0, 8, 8))
    monkeypatch.setattr(label_store.socket, "gethostname", lambda: "elsewhere")
    assert not list(other.claimed([0]))
    os.utime(shard.claim.path, (1, 1))
    taken = next(other.claimed([0]))
    shard.claim.append(Record(1, 8, 8))  # it was only slow
    for position, _ in taken.waiting:
        taken.claim.append(Record(position, 9, 9))
    other.finish(taken)
    assert [record.position for _, record in other.results()] == [0, 1, 2, 3]
    assert [record.width for _, record in other.results()] == [8, 8, 9, 9]


def test_a_renewed_claim_is_not_void(tmp_path, monkeypatch):
    monkeypatch.setattr(label_store, "HEARTBEAT", 0.01)
    run = begin(tmp_path)
    shard = next(run.claimed([0]))
    os.utime(shard.claim.path, (1, 1))
    with run.heartbeat():
        while shard.claim.path.stat().st_mtime == 1:
            pass
    monkeypatch.setattr(label_store.socket, "gethostname", lambda: "elsewhere")
    assert not list(begin(tmp_path).claimed([0]))


def test_a_record_cut_off_at_any_byte_is_passed_over(tmp_path):
    run = begin(tmp_path)
    shard = next(run.claimed([0]))
    for position in (0, 1):
        shard.claim.append(Record(position, 8, 8, b"x" * 16, b"y" * 4, b"z" * 4))
    content = shard.claim.path.read_bytes()
    first = content.index(b"\n") + 1
    for end in range(first, len(content)):
        shard.claim.path.write_bytes(content[:end])
        whole = [record.position for record in read_records(shard.claim.path)]
        assert whole == ([0] if end >= first + (len(content) - first) // 2 else [])
    shard.claim.path.write_bytes(content[:-1] + b"?")
    assert [record.position for record in read_records(shard.claim.path)] == [0]


def test_a_run_of_something_else_is_refused_by_name(tmp_path):
    begin(tmp_path)
    with pytest.raises(ValueError, match=r"holds a run with prompts \['cat'\], not \['dog'\]: give another --out"):
        begin(tmp_path, asked={**ASKED, "prompts": ["dog"]})
    with pytest.raises(ValueError, match="no labelling run"):
        LabelRun(tmp_path / "none")
    with pytest.raises(ValueError, match="no image was found"):
        begin(tmp_path / "empty", images=0)
    (tmp_path / "manifest.json").write_text(json.dumps({"asked": {}}))
    with pytest.raises(ValueError, match="manifest.json: damaged"):
        LabelRun(tmp_path)


def test_images_are_listed_by_one_process_and_after_it_died_by_another(tmp_path):
    (tmp_path / "shards").mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owner = {"host": label_store.socket.gethostname(), "process": dead.pid}
    (tmp_path / "shards" / "list.0").write_text(json.dumps(owner) + "\n")
    assert begin(tmp_path).manifest.images == 10
    assert not list((tmp_path / "shards").glob("list.*"))


def test_the_records_of_a_shard_are_on_the_disk_before_it_is_called_done(tmp_path, monkeypatch):
    flushed, fsync, run = [], os.fsync, begin(tmp_path)
    monkeypatch.setattr("os.fsync", lambda fd: (flushed.append((os.fstat(fd).st_ino, run.is_done(0))), fsync(fd)))
    shard = next(run.claimed([0]))
    shard.claim.append(Record(0, 8, 8))
    run.finish(shard)
    assert flushed[0] == (shard.claim.path.stat().st_ino, False) and run.is_done(0)


def test_records_that_others_found_are_collected_once_in_any_order(tmp_path):
    run = begin(tmp_path)
    collector = Collector(run)
    order = [9, 0, 5, 1, 1, 8, 2, 9]
    assert [collector.add(Record(position, 8, 8)) for position in order] == [True] * 4 + [False, True, True, False]
    assert [run.is_done(number) for number in range(3)] == [False, False, True]
    again = LabelRun(tmp_path)  # of another process, which the first has left shards to
    assert [[position for position, _ in again.waiting(number)] for number in range(3)] == [[3], [4, 6, 7], []]
    collector = Collector(again)
    assert all(collector.add(Record(position, 8, 8)) for position in (7, 6, 4, 3))
    assert everything(again) == [(f"{n}.png", n) for n in range(10)] and again.done_images() == 10


def test_records_of_a_shard_that_another_process_works_on_are_left_to_it(tmp_path, monkeypatch):
    other = begin(tmp_path)
    shard = next(other.claimed([1]))
    monkeypatch.setattr(os, "getpid", lambda: os.getppid())  # another process of this host, which lives
    collector = Collector(begin(tmp_path))
    assert not collector.add(Record(5, 8, 8)) and collector.add(Record(0, 8, 8))
    assert not list(read_records(shard.claim.path))
