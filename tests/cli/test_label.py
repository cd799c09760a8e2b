"""`groundingdino label`, run as a user would: every source and format, again, with other thresholds, and killed."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from golden_cases import tiny_model
from label_runs import NAMES, REPOSITORY, SMALL, command, environment, records, write_film, write_images

from groundingdino.checkpoints.model_file import save_detector
from groundingdino.cli import loading
from groundingdino.cli import main as command_line
from groundingdino.data.formats import registry
from groundingdino.inference.label_store import read_records
from groundingdino.inference.predictor import load_model
from groundingdino.inference.vocabulary import read_vocabulary


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_detector(path, tiny_model(), {"groundingdino.source": json.dumps({"file": "mmdet_checkpoint.pth"})})
    return path


@pytest.fixture
def place(tmp_path, checkpoint, monkeypatch):
    """A folder with photos/, names.yaml and the model, as the current one."""
    write_images(tmp_path / "photos", 7)
    (tmp_path / "names.yaml").write_text(NAMES)
    (tmp_path / "tiny.safetensors").write_bytes(checkpoint.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object, names: str = "names.yaml") -> int:
    return command_line.main(["label", *SMALL, "--names", names, *map(str, arguments)])


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_labels_are_what_the_predictor_finds_and_the_folder_shows_them(place, capsys):
    (place / "photos" / "damaged.png").write_bytes(b"no image")
    assert run("photos", "--out", "out", "--to", "jsonl", "--nms", "1", "--shard-size", "3") == 0
    assert "8 images labelled: out/labels.jsonl, 1 could not be read: out/broken.jsonl" in capsys.readouterr().out
    found = rows(place / "out" / "labels.jsonl")
    assert [row["image"] for row in found] == [f"{number:03d}.png" for number in range(7)]
    problem = f"{place / 'photos' / 'damaged.png'}: not a readable image (of no known format)"
    assert rows(place / "out" / "broken.jsonl") == [{"image": "damaged.png", "problem": problem}]
    predictor = load_model(place / "tiny.safetensors", "cpu", scale=(48, 64))
    for row in found:
        expected = predictor.predict(place / "photos" / row["image"], read_vocabulary("names.yaml"), threshold=0.03)
        assert [one["name"] for one in row["detections"]] == list(expected.names)
        np.testing.assert_allclose([one["box"] for one in row["detections"]], expected.boxes, atol=0.006)
    assert len(list((place / "out" / "sample").glob("*.jpg"))) == 7
    counts = json.loads((place / "out" / "scores.json").read_text())["counts"]
    assert sum(counts["animal"]) == sum(one["name"] == "animal" for row in found for one in row["detections"]) > 0
    assert ElementTree.parse(place / "out" / "scores.svg").getroot().tag.endswith("svg")


def test_batches_by_shape_and_other_processes_decoding_change_nothing(place):
    assert run("photos", "--out", "one", "--to", "jsonl") == 0
    arguments = ["label", "photos", "--names", "names.yaml", "--out", "many", "--to", "jsonl", "--batch-size", "4"]
    assert command_line.main([*arguments, *SMALL[:-1], "2", "--shard-size", "5"]) == 0
    for ours, theirs in zip(rows(place / "one/labels.jsonl"), rows(place / "many/labels.jsonl"), strict=True):
        assert ours["image"] == theirs["image"]
        assert [one["name"] for one in ours["detections"]] == [one["name"] for one in theirs["detections"]]
        for one, other in zip(ours["detections"], theirs["detections"], strict=True):
            assert one["box"] == pytest.approx(other["box"], abs=0.02)
            assert one["score"] == pytest.approx(other["score"], abs=1e-4)


def test_the_same_command_twice_does_nothing_and_others_need_rescore(place, capsys, monkeypatch):
    assert run("photos", "--out", "out") == 0
    before = {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*") if path.is_file()}
    monkeypatch.setattr(loading, "load_predictor", lambda *_: pytest.fail("the model was loaded"))
    capsys.readouterr()
    assert run("photos", "--out", "out") == 0
    assert "nothing to do: all 7 images" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*") if path.is_file()} == before

    assert run("photos", "--out", "out", "--top-k", "1") == 2
    assert "--rescore, or give another --out" in capsys.readouterr().err
    assert run("--out", "out", "--top-k", "1", "--rescore") == 0
    document = json.loads((place / "out" / "coco.json").read_text())
    assert len(document["annotations"]) <= 7
    assert run("--out", "out", "--rescore", "--to", "jsonl", names="coco") == 2
    assert "did not ask for 'person': start a new one" in capsys.readouterr().err
    (place / "fewer.txt").write_text("toy\ncat\n")  # a negative becomes a name
    capsys.readouterr()
    assert run("--out", "out", "--rescore", "--to", "jsonl", names="fewer.txt") == 0
    assert "still of earlier names or thresholds: coco.json\n" in capsys.readouterr().out
    assert {one["name"] for row in rows(place / "out/labels.jsonl") for one in row["detections"]} <= {"toy", "cat"}
    assert run("--out", "out", "--rescore", "--to", "coco", names="fewer.txt") == 0
    assert "still of earlier" not in capsys.readouterr().out
    assert run("--out", "out", "--rescore", "--threshold", "0.001") == 2
    assert "below 0.01, the least score that was stored" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["coco", "yolo", "voc", "odvg"])
def test_every_format_is_read_back_with_the_same_boxes(place, to):
    assert run("photos", "--out", "out", "--to", "jsonl") == 0
    assert run("photos", "--out", "out", "--to", to) == 0
    reading = registry.read(place / "out" / {"coco": "coco.json", "odvg": "odvg.jsonl"}.get(to, to))
    expected = {row["image"]: row["detections"] for row in rows(place / "out" / "labels.jsonl")}
    found = {entry.file_name.split("/")[-1]: entry for entry in reading}
    assert len(found) == 7
    for name, entry in found.items():
        wanted = [one for one in expected[name]]
        assert len(entry.objects) == len(wanted)
        for thing, one in zip(entry.objects, wanted, strict=True):
            assert thing.name == one["name"] and thing.box == pytest.approx(one["box"], abs=0.01)
    if to == "yolo":
        scores = (place / "out/yolo/scores/000.txt").read_text().split()
        assert len(scores) == len(expected["000.png"])


def test_label_studio_gets_tasks_with_scored_predictions(place):
    assert run("photos", "--out", "out", "--to", "labelstudio") == 0
    tasks = json.loads((place / "out" / "labelstudio.json").read_text())
    assert [task["data"]["image"] for task in tasks] == [f"/data/local-files/?d={n:03d}.png" for n in range(7)]
    results = [result for task in tasks for result in task["predictions"][0]["result"]]
    assert results and all(0 <= result["value"]["x"] <= 100 and 0 < result["score"] <= 1 for result in results)
    assert {result["value"]["rectanglelabels"][0] for result in results} <= {"animal", "boat"}


def test_tar_shards_and_tiles(place):
    with tarfile.open("shard.tar", "w") as shard:
        for path in sorted((place / "photos").iterdir()):
            member = tarfile.TarInfo(path.name)
            member.size = path.stat().st_size
            shard.addfile(member, io.BytesIO(path.read_bytes()))
    assert run("shard.tar", "--out", "tar", "--to", "jsonl") == 0
    assert run("photos", "--out", "plain", "--to", "jsonl", "--tiles", "64") == 0  # every image is one tile
    tar, plain = rows(place / "tar/labels.jsonl"), rows(place / "plain/labels.jsonl")
    assert [row["detections"] for row in tar] == [row["detections"] for row in plain]
    assert run("shard.tar", "--out", "tar", "--to", "yolo") == 0
    assert run("photos/000.png", "--out", "tiled", "--to", "jsonl", "--tiles", "40", "--merge", "fusion") == 0
    assert rows(place / "tiled/labels.jsonl") != plain[:1]


def test_a_coco_file_keeps_its_ids(place):
    images = [{"id": 100 + n, "file_name": f"{n:03d}.png", "width": 64, "height": 48} for n in range(2)]
    document = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (place / "photos" / "gold.json").write_text(json.dumps(document))
    assert run("photos/gold.json", "--out", "out") == 0
    written = json.loads((place / "out" / "coco.json").read_text())
    assert [image["id"] for image in written["images"]] == [100, 101]
    assert {one["image_id"] for one in written["annotations"]} == {100, 101}
    assert all(one["score"] >= 0.015 for one in written["annotations"])


def test_thresholds_are_picked_on_labelled_images(place, capsys):
    assert run("photos", "--out", "out", "--threshold", "0.05") == 0
    assert run("--threshold-from", "out/coco.json", "--out", "gold") == 0
    printed = capsys.readouterr().out
    assert "animal: " in printed and "threshold of the highest F1: " in printed and "(F1 100.0%)" in printed
    chosen = read_vocabulary("gold/names.yaml")
    assert chosen.shown == ("animal", "boat") and chosen.names[0].negatives == ("toy",)
    before = json.loads((place / "out" / "coco.json").read_text())["annotations"]
    assert run("--out", "gold", "--rescore", names="gold/names.yaml") == 0
    after = json.loads((place / "gold" / "coco.json").read_text())["annotations"]
    assert [one["bbox"] for one in after if one["category_id"] == 1] == [
        one["bbox"] for one in before if one["category_id"] == 1
    ]  # the labels that the thresholds were picked from are found again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos"], "give --names and --out"),
        (["--out", "out", "--names", "names.yaml"], "no image given"),
        (["photos", "--out", "out", "--names", "cats"], "cats: no such file, nor a packaged list"),
        (["nowhere", "--out", "out", "--names", "coco"], "nowhere: no such file or folder"),
        (["photos", "--out", "out", "--names", "coco", "--tiles", "8"], "tiles of 8 pixels"),
        (["photos", "--out", "out", "--names", "coco", "--every", "0"], "--every 0"),
        (["photos", "--out", "out", "--names", "coco", "--nms", "2"], "nms 2.0 is an IoU"),
        (["photos", "--out", "out", "--names", "coco", "--batch-size", "0"], "batch_size 0"),
        (["photos", "--out", "out", "--names", "coco", "--keep-above", "3"], "keep_above 3.0"),
        (["--out", "out", "--names", "coco", "--rescore"], "out: no labelling run"),
        (["--review", "nowhere"], "nowhere: no labelling run"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(place, capsys, arguments, message):
    assert command_line.main(["label", *arguments, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def killed_six_times(arguments: list[str], out: Path) -> None:
    """Start the command and kill it as soon as it has found more than before."""
    log = []
    for _ in range(6):
        before, patience = records(out), time.monotonic() + 60
        process = multiprocessing.get_context("fork").Process(target=command_line.main, args=(["label", *arguments],))
        process.start()
        while process.is_alive() and records(out) <= before + 2000 and time.monotonic() < patience:
            time.sleep(0.001)
        process.kill()
        process.join()
        log.append((process.exitcode, records(out)))
    print("exit code and bytes of records after each kill:", log)
    assert {code for code, _ in log} == {-signal.SIGKILL} and not (out / "labels.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("images", ["photos", "film.mp4"])
def test_killed_again_and_again_no_image_is_lost_or_labelled_twice(place, images):
    (place / "photos").rename(place / "few")
    if images == "photos":
        write_images(place / "photos", 60)
    else:
        write_film(place / "film.mp4", 120)
    source = [images, "--every", "2"] if images == "film.mp4" else [images]
    arguments = [*SMALL, "--names", "names.yaml", *source, "--to", "jsonl"]
    killed_six_times([*arguments, "--out", "killed", "--shard-size", "16"], place / "killed")
    assert command_line.main(["label", *arguments, "--out", "killed", "--shard-size", "16"]) == 0
    assert command_line.main(["label", *arguments, "--out", "whole"]) == 0
    assert (place / "killed/labels.jsonl").read_bytes() == (place / "whole/labels.jsonl").read_bytes()
    files = [path for path in (place / "killed/shards").iterdir() if path.suffix != ".done"]
    positions = sorted(record.position for path in files for record in read_records(path))
    assert positions == list(range(60))  # no image was labelled twice
    found = rows(place / "killed/labels.jsonl")
    assert len({str(row["detections"]) for row in found}) > 10  # they are not all of one image
    if images == "film.mp4":
        assert [row["frame"] for row in found] == list(range(0, 120, 2))


@pytest.mark.slow
def test_two_ranks_of_torchrun_of_which_one_is_killed_and_restarted(place):
    (place / "photos").rename(place / "few")
    write_images(place / "photos", 60)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1", "--standalone"]
    arguments = [*command("--out", "ranks", "--to", "jsonl", "--shard-size", "4")[1:]]
    process = subprocess.Popen([*launcher, *arguments], env=environment(), stderr=subprocess.PIPE, text=True)
    owners: set[int] = set()
    while len(owners) < 2 and process.poll() is None:
        claims = [path for path in (place / "ranks" / "shards").glob("0*.0")]
        owners = {json.loads(line)["process"] for path in claims if (line := path.read_bytes().partition(b"\n")[0])}
        time.sleep(0.002)
    os.kill(max(owners), signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    subprocess.run(command("--out", "whole", "--to", "jsonl"), env=environment(), check=True)
    assert (place / "ranks/labels.jsonl").read_bytes() == (place / "whole/labels.jsonl").read_bytes()
    assert len(owners) == 2


def test_the_tracking_example_of_the_page_runs(place, capsys):
    if not hasattr(pytest.importorskip("supervision"), "ByteTrack"):
        pytest.skip("this supervision has no ByteTrack")
    (place / "labels").mkdir()
    frames = [
        {"frame": 5 * n, "detections": [{"box": [10 + n, 10, 60 + n, 60], "score": 0.9, "label": 0}]} for n in range(4)
    ]
    (place / "labels" / "labels.jsonl").write_text("".join(json.dumps(frame) + "\n" for frame in frames))
    page = (REPOSITORY / "docs" / "labelling.md").read_text().split("## Tracking")[1]
    exec(page.split("```python\n")[1].split("```")[0], {})
    tracks = [line.split(" [[")[0] for line in capsys.readouterr().out.splitlines()]
    assert tracks == ["0 [1]", "5 [1]", "10 [1]", "15 [1]"]


def test_masks_of_a_sam_stand_in_the_coco_file_and_pycocotools_reads_them(place, capsys):
    pytest.importorskip("transformers")
    from pycocotools.coco import COCO
    from tiny_sam import write_sam

    write_sam(place / "sam")
    command = ["label", "photos", "--names", "names.yaml", "--checkpoint", "tiny.safetensors", *SMALL]
    assert command_line.main([*command, "--out", "run", "--masks", "sam"]) == 0
    truth = COCO("run/coco.json")
    annotations = truth.loadAnns(truth.getAnnIds())
    assert len(annotations) > 3
    for annotation in annotations:
        size = truth.imgs[annotation["image_id"]]
        assert truth.annToMask(annotation).shape == (size["height"], size["width"])
    assert command_line.main([*command, "--out", "other", "--masks", "sam", "--to", "yolo"]) == 2
    assert "has no place for masks" in capsys.readouterr().err


@pytest.fixture
def store(place):
    """A store in memory with the photos."""
    import fsspec

    system = fsspec.filesystem("memory")
    system.put(str(place / "photos"), "/bucket/photos", recursive=True)
    yield system
    system.rm("/bucket", recursive=True)


def test_images_of_a_store_give_the_same_labels_which_are_copied_to_a_store(place, store, capsys):
    assert run("photos", "--out", "local", "--to", "jsonl") == 0
    wanted = (place / "local" / "labels.jsonl").read_bytes()
    command = ("memory://bucket/photos", "--out", "out", "--to", "jsonl", "--upload", "memory://bucket/labels")
    assert run(*command) == 0 and "copied to memory://bucket/labels" in capsys.readouterr().out
    assert store.cat_file("/bucket/labels/labels.jsonl") == wanted
    assert sorted(name.split("/")[-1] for name in store.ls("/bucket/labels", detail=False)) == [
        "broken.jsonl", "labels.jsonl", "sample", "scores.json", "scores.svg",
    ]  # fmt: skip
    assert len(store.ls("/bucket/labels/sample")) == 7
    assert run(*command) == 0 and "copied" not in capsys.readouterr().out
    assert run(*command, "--threshold", "0.04", "--rescore") == 0 and "copied" in capsys.readouterr().out
    assert run("memory://bucket/photos", "--out", "out", "--threshold", "0.04", "--to", "yolo") == 0
    assert len(list((place / "out" / "yolo").rglob("labels/**/*.txt"))) == 7
    assert run("memory://bucket/photos", "--out", "s3://bucket/labels") == 2
    assert "--upload copies the labels" in capsys.readouterr().err


def test_a_store_that_does_not_answer_ends_the_run_which_goes_on_later(place, store, capsys, monkeypatch):
    command = ("memory://bucket/photos", "--out", "out", "--to", "jsonl")
    with monkeypatch.context() as broken:
        broken.setattr(type(store), "cat_file", lambda *_, **__: (_ for _ in ()).throw(TimeoutError("no answer")))
        assert run(*command) == 2
    assert "TimeoutError: no answer" in capsys.readouterr().err
    assert run(*command) == 0 and not rows(place / "out" / "broken.jsonl")
    assert len(rows(place / "out" / "labels.jsonl")) == 7


def test_a_video_is_labelled_by_frames_and_one_that_is_none_ends_in_one_line(place, capfd):
    write_film(place / "film.mp4", 11)
    assert run("film.mp4", "--every", "5", "--out", "out", "--to", "jsonl") == 0
    assert [row["frame"] for row in rows(place / "out" / "labels.jsonl")] == [0, 5, 10]
    (place / "cut.mp4").write_bytes((place / "film.mp4").read_bytes()[:600])
    capfd.readouterr()
    assert run("cut.mp4", "--out", "cut") == 2
    errors = capfd.readouterr().err  # with what FFmpeg writes by itself
    assert "cut.mp4: not a readable video (" in errors and errors.count("\n") == 1
