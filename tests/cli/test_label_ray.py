"""`groundingdino label --ray` on a real Ray of two nodes, in whose current folder the run's folder is not found."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from golden_cases import tiny_model
from label_runs import NAMES, command, environment, records, write_images

from groundingdino.checkpoints.model_file import save_detector
from groundingdino.cli import main as command_line
from groundingdino.cli.label_ray import STOPS, Labeller
from groundingdino.inference.image_source import ImageRef
from groundingdino.inference.label_store import Record, read_records
from groundingdino.inference.labelling import LabelOptions
from groundingdino.inference.vocabulary import read_vocabulary

pytest.importorskip("ray.data")
pyarrow = pytest.importorskip("pyarrow")
CLUSTER = """
import os, sys
os.chdir("/")
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
OUT = "/proc/self/cwd/"  # another folder in each process


@pytest.fixture
def address():
    """Of a cluster of two nodes with one processor each."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    yield process.stdout.readline().strip()
    process.stdin.close()
    process.wait(timeout=100)


@pytest.fixture
def place(tmp_path, monkeypatch):
    save_detector(
        tmp_path / "tiny.safetensors", tiny_model(), {"groundingdino.source": json.dumps({"file": "mmdet.pth"})}
    )
    write_images(tmp_path / "photos", 24)
    (tmp_path / "photos" / "damaged.png").write_bytes(b"no image")
    (tmp_path / "names.yaml").write_text(NAMES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def killed(arguments: list[str], out: Path) -> int:
    """Start the command, kill it when more records than before are there; its process."""
    before, patience = records(out), time.monotonic() + 200
    process = subprocess.Popen(arguments, env=environment(), start_new_session=True)
    while process.poll() is None and records(out) <= before + 3000 and time.monotonic() < patience:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    return process.pid


def images(path: Path) -> list[str]:
    return [json.loads(line)["image"] for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_nodes_that_do_not_see_the_runs_folder_label_as_one_process_does_though_it_is_killed(place, address):
    again = command("--out", OUT + "ray", "--to", "jsonl", "--shard-size", "8", "--ray", address)
    writers = {killed(again, place / "ray")}
    assert 0 < records(place / "ray") and not (place / "ray" / "labels.jsonl").exists()
    with subprocess.Popen(again, env=environment()) as last:
        writers.add(last.pid)
    assert last.returncode == 0
    subprocess.run(command("--out", "whole", "--to", "jsonl"), env=environment(), check=True)
    assert (place / "ray" / "labels.jsonl").read_bytes() == (place / "whole" / "labels.jsonl").read_bytes()
    assert images(place / "ray" / "broken.jsonl") == ["damaged.png"]

    files = [path for path in (place / "ray" / "shards").iterdir() if path.suffix != ".done"]
    positions = sorted(record.position for path in files for record in read_records(path))
    assert positions == list(range(25))  # no image was labelled twice
    owners = {json.loads(path.read_bytes().partition(b"\n")[0])["process"] for path in files}
    assert owners == writers  # the actors, other processes, wrote nothing


def test_what_stops_an_actor_comes_back_as_its_last_record(place):
    ref = ImageRef("000.png", str(place / "photos" / "000.png"))
    rows = pyarrow.table({"image": [msgspec.msgpack.encode((0, ref))]})
    vocabulary, options = read_vocabulary("names.yaml"), LabelOptions(workers=0)

    def found(checkpoint: str) -> list[Record]:
        tables = Labeller((Path(checkpoint), "cpu", "fp32", (48, 64)), vocabulary, options)(rows)
        return [msgspec.msgpack.decode(row, type=Record) for t in tables for row in t["record"].to_pylist()]

    assert [(record.position, record.problem) for record in found("tiny.safetensors")] == [(0, "")]
    (stop,) = found("none.safetensors")
    assert stop.position == STOPS and "none.safetensors: no such file" in stop.problem


def test_an_address_at_which_nothing_listens_is_told_at_once(place, capsys):
    assert command_line.main(["label", "photos", "--names", "names.yaml", "--out", "out", "--ray", "127.0.0.1:9"]) == 2
    assert "--ray 127.0.0.1:9: nothing listens there" in capsys.readouterr().err
