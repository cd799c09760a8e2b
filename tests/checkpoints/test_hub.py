"""Weights by name: downloaded whole or not at all, converted once, and in one line where it cannot be."""

import dataclasses
import hashlib
import http.server
import json
import logging
import multiprocessing
import os
import shutil
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from groundingdino import checkpoints, load_model
from groundingdino.checkpoints import download as download_module
from groundingdino.checkpoints import hub, zoo
from groundingdino.checkpoints.convert import convert_file
from groundingdino.checkpoints.download import DownloadError, download
from groundingdino.checkpoints.model_file import SOURCE_KEY, read_metadata
from groundingdino.training.recipes import refcoco
from groundingdino.training.setup import initial_model

CONTENT = bytes(range(256)) * 4000  # about 1 MB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at any path; `behaviours` are taken one a request, then it is honest."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.behaviours: list[str] = []
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file.pth"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server: Server = self.server  # type: ignore[assignment]
        behaviour = server.behaviours.pop(0) if server.behaviours else ""
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        if behaviour.isdecimal():
            self.send_error(int(behaviour))
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and behaviour != "no ranges" else 0
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        rest = server.content[start:]
        if behaviour == "slow":
            time.sleep(3 * download_module.TIMEOUT)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest) + (1000 if behaviour == "promises more" else 0)))
        self.end_headers()
        self.wfile.write(rest[: len(rest) // 2] if behaviour == "breaks off" else rest)
        if behaviour in ("breaks off", "promises more"):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download_module, "PAUSE", 0.01)
    serving = Server()
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    yield serving
    serving.shutdown()
    serving.server_close()


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("GROUNDINGDINO_CACHE", str(tmp_path / "cache"))
    for name in ("GROUNDINGDINO_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def one_line(problem: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(problem.value)
    return str(problem.value)


# Downloads


def test_a_file_comes_whole_and_checked(server, tmp_path):
    download(server.url, tmp_path / "file.pth", DIGEST[:8])
    assert (tmp_path / "file.pth").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]


def test_all_of_a_file_is_on_the_disk_before_it_has_its_name(server, tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda fd: (events.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr("os.replace", lambda a, b: (events.append("rename"), replace(a, b)))
    server.content = CONTENT[:1000]  # less than a buffer
    download(server.url, tmp_path / "file.pth", hashlib.sha256(server.content).hexdigest())
    assert events == [len(server.content), "rename"]


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    server.behaviours = ["breaks off"] * 3
    download(server.url, tmp_path / "file.pth", DIGEST)
    assert (tmp_path / "file.pth").read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert server.ranges[:2] == [None, f"bytes={half}-"] and len(server.ranges) == 4


def test_what_an_earlier_process_left_is_used(server, tmp_path):
    (tmp_path / "file.pth.part").write_bytes(CONTENT[:1234])
    download(server.url, tmp_path / "file.pth", DIGEST)
    assert (tmp_path / "file.pth").read_bytes() == CONTENT and server.ranges == ["bytes=1234-"]


def test_a_part_that_is_whole_is_not_fetched_again(server, tmp_path):
    (tmp_path / "file.pth.part").write_bytes(CONTENT)
    download(server.url, tmp_path / "file.pth", DIGEST)
    assert (tmp_path / "file.pth").read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_thrown_away(server, tmp_path):
    (tmp_path / "file.pth.part").write_bytes(CONTENT + b"x")
    download(server.url, tmp_path / "file.pth", DIGEST)
    assert (tmp_path / "file.pth").read_bytes() == CONTENT


def test_a_server_that_does_not_resume_starts_from_the_beginning(server, tmp_path):
    server.behaviours = ["breaks off", "no ranges"]
    download(server.url, tmp_path / "file.pth", DIGEST)
    assert (tmp_path / "file.pth").read_bytes() == CONTENT


def test_a_passing_error_of_the_server_is_tried_again(server, tmp_path):
    server.behaviours = ["503", "429"]
    download(server.url, tmp_path / "file.pth", DIGEST)
    assert (tmp_path / "file.pth").read_bytes() == CONTENT


def test_a_server_that_says_nothing_is_asked_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "TIMEOUT", 0.2)
    server.behaviours = ["slow"]
    download(server.url, tmp_path / "file.pth", DIGEST)
    assert (tmp_path / "file.pth").read_bytes() == CONTENT and len(server.ranges) == 2


def test_a_server_that_promises_more_than_it_sends_is_not_believed(server, tmp_path):
    server.behaviours = ["promises more"] * 20
    server.content = CONTENT[:500]
    with pytest.raises(DownloadError, match="SHA-256|could not be fetched") as problem:
        download(server.url, tmp_path / "file.pth", DIGEST)
    one_line(problem)
    assert not (tmp_path / "file.pth").exists()


def test_a_wrong_file_is_not_kept(server, tmp_path):
    server.content = b"<html>moved</html>"
    with pytest.raises(DownloadError, match=f"has SHA-256 .*, expected {DIGEST[:8]}") as problem:
        download(server.url, tmp_path / "file.pth", DIGEST[:8])
    one_line(problem)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there_is_not_asked_for_twice(server, tmp_path):
    server.behaviours = ["404"]
    with pytest.raises(DownloadError, match="the server answers 404"):
        download(server.url, tmp_path / "file.pth")
    assert len(server.ranges) == 1


def test_without_a_server_the_download_ends(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(DownloadError, match=r"could not be fetched \(.*refused"):
        download(server.url, tmp_path / "file.pth")


# Names


@pytest.fixture
def release(golden, server, cache, monkeypatch) -> zoo.Release:
    """A release that lies on our server."""
    server.content = (golden / "tiny/mmdet_checkpoint.pth").read_bytes()
    digest = hashlib.sha256(server.content).hexdigest()
    made = zoo.Release(
        "tiny", "Tiny", "swin_t", "nothing", server.url.replace("file", f"tiny-{digest[:8]}"), digest[:8]
    )
    monkeypatch.setitem(zoo.BY_NAME, "tiny", made)
    monkeypatch.setattr(zoo, "RELEASES", (*zoo.RELEASES, made))
    return made


def test_a_model_is_loaded_by_its_name_and_fetched_once(release, server, cache):
    assert not hub.is_cached(release)
    predictor = load_model("tiny", "cpu")
    assert predictor.model.config.decoder_layers == 2 and hub.is_cached(release)
    assert json.loads(read_metadata(checkpoints.resolve("tiny"))[SOURCE_KEY])["release"] == "Tiny"
    assert len(server.ranges) == 1
    assert {path.suffix for path in (cache / "converted" / hub.CONVERSION).iterdir()} == {".safetensors", ".lock"}


def test_without_the_network_one_line_says_what_to_do(release, server, cache, monkeypatch):
    for name in ("GROUNDINGDINO_OFFLINE", "HF_HUB_OFFLINE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            with pytest.raises(ValueError, match="tiny: not in the cache") as problem:
                checkpoints.resolve("tiny")
            assert release.url in one_line(problem) and str(cache) in one_line(problem)
    assert not server.ranges
    server.behaviours = ["404"]
    with pytest.raises(ValueError, match=r"the server answers 404.*; or fetch http") as problem:
        checkpoints.resolve("tiny")
    one_line(problem)


def test_what_is_in_the_cache_needs_no_network(release, server, monkeypatch):
    checkpoints.resolve("tiny")
    monkeypatch.setenv("GROUNDINGDINO_OFFLINE", "1")
    assert checkpoints.resolve("tiny").exists()


def _resolve(name: str, release: zoo.Release, found) -> None:
    zoo.BY_NAME[name] = release
    found.put(str(checkpoints.resolve(name)))


def test_two_processes_that_ask_at_once_fetch_and_convert_once(release, server):
    spawn = multiprocessing.get_context("spawn")
    found = spawn.Queue()
    both = [spawn.Process(target=_resolve, args=("tiny", release, found)) for _ in range(2)]
    for process in both:
        process.start()
    paths = {found.get(timeout=120) for _ in both}
    for process in both:
        process.join(30)
    assert len(paths) == 1 and Path(paths.pop()).exists() and len(server.ranges) == 1


def test_a_foreign_file_is_converted_once(golden, cache, caplog):
    caplog.set_level(logging.INFO, logger="groundingdino")  # a command may have set it before
    first = checkpoints.resolve(golden / "tiny/mmdet_checkpoint.pth")
    assert first.is_relative_to(cache) and "parameters" in caplog.text
    caplog.clear()
    assert checkpoints.resolve(str(golden / "tiny/mmdet_checkpoint.pth")) == first and not caplog.text
    assert checkpoints.resolve(first) == first


def test_another_file_of_the_same_name_is_not_mistaken_for_the_first(golden, cache, tmp_path):
    shutil.copy(golden / "tiny/mmdet_checkpoint.pth", tmp_path / "w.pth")
    first = checkpoints.resolve(tmp_path / "w.pth")
    state = torch.load(tmp_path / "w.pth", weights_only=True)
    state["state_dict"]["level_embed"] += 1
    torch.save(state, tmp_path / "w.pth")
    second = checkpoints.resolve(tmp_path / "w.pth")
    assert first != second and not torch.equal(
        load_file(first)["level_embedding"], load_file(second)["level_embedding"]
    )


@pytest.mark.parametrize("age", [-1000, 1000])
def test_training_begins_with_the_file_that_is_named_whatever_lies_beside_it(age, golden, cache, tmp_path):
    named, beside = tmp_path / "w.pth", tmp_path / "w.safetensors"
    state = torch.load(golden / "tiny/mmdet_checkpoint.pth", weights_only=True)
    torch.save(state, named)
    convert_file(named, beside)  # as if it had been made of the file that is named, which was replaced since
    state["state_dict"]["level_embed"] += 1
    torch.save(state, named)
    time_of_change = named.stat().st_mtime + age  # older, or newer
    os.utime(beside, (time_of_change, time_of_change))
    embedding = initial_model(dataclasses.replace(refcoco(), init_from=named)).state_dict()["level_embedding"]
    torch.testing.assert_close(embedding, state["state_dict"]["level_embed"])
    assert not torch.equal(embedding, load_file(beside)["level_embedding"])


def test_a_folder_in_shards_is_read(golden, cache, tmp_path):
    convert_file(golden / "tiny/mmdet_checkpoint.pth", tmp_path / "a.safetensors")
    convert_file(tmp_path / "a.safetensors", tmp_path / "whole", to="huggingface")
    state = load_file(tmp_path / "whole/model.safetensors")
    (tmp_path / "shards").mkdir()
    names = sorted(state)
    weight_map = {}
    for i in range(2):
        part, file = names[i::2], f"{i}.safetensors".rjust(255, "a")  # the longest name that a file can have
        save_file({name: state[name] for name in part}, tmp_path / "shards" / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "shards/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = load_file(checkpoints.resolve(tmp_path / "shards"))
    before = load_file(tmp_path / "a.safetensors")
    differing = [name for name in before if not torch.equal(before[name], found[name])]
    assert found.keys() == before.keys() and differing == ["denoising.label_embedding.weight"]
    for file in ("../secret", "a" * 256, "a\nb", 3):
        (tmp_path / "shards/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(ValueError, match="not the index of a model in several files"):
            checkpoints.resolve(tmp_path / "shards")


def test_a_cache_that_cannot_be_written_is_named(golden, cache):
    cache.write_text("a file where a folder should be")
    with pytest.raises(OSError, match="cannot be written.*GROUNDINGDINO_CACHE") as problem:
        checkpoints.resolve(golden / "tiny/mmdet_checkpoint.pth")
    one_line(problem)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; see the read-only disk below")
def test_a_read_only_cache_serves_what_is_in_it(golden, cache):
    first = checkpoints.resolve(golden / "tiny/mmdet_checkpoint.pth")
    first.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert checkpoints.resolve(golden / "tiny/mmdet_checkpoint.pth") == first


def test_unknown_names_and_files_are_answered_with_what_there_is(cache, tmp_path):
    with pytest.raises(ValueError, match=r"no such file; releases that can be named: mm-gdino-t, "):
        checkpoints.resolve("mm-gdino-x")
    with pytest.raises(ValueError, match=r"fetch it from https://.*f83eef00\.pth, or name the release: mm-gdino-b"):
        checkpoints.resolve(tmp_path / zoo.BY_NAME["mm-gdino-b"].file)
    with pytest.raises(ValueError, match="only figures were published"):
        checkpoints.resolve("mm-gdino-t-lvis")


def test_a_repository_of_the_hub_offline_is_one_line(cache, monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("GROUNDINGDINO_OFFLINE", "1")
    with pytest.raises(ValueError, match="no-one/nothing: .*not in the cache of huggingface_hub") as problem:
        checkpoints.resolve("no-one/nothing")
    one_line(problem)


# Disks


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, which holds a megabyte and can be made read-only: also root cannot write there."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_a_download_at_once_and_what_came_is_kept(server, small_disk):
    server.content = CONTENT * 3
    with pytest.raises(OSError, match="No space left"):
        download(server.url, small_disk / "file.pth", DIGEST)
    assert len(server.ranges) == 1 and [path.name for path in small_disk.iterdir()] == ["file.pth.part"]


def test_a_full_disk_is_one_line_when_a_release_is_named(release, small_disk, monkeypatch):
    monkeypatch.setenv("GROUNDINGDINO_CACHE", str(small_disk / "cache"))
    with pytest.raises(
        OSError, match=r"tiny: .* cannot be written \(No space left on device\).*GROUNDINGDINO_CACHE"
    ) as p:
        checkpoints.resolve("tiny")
    one_line(p)


def test_a_full_disk_is_one_line_when_a_file_is_converted(golden, small_disk, monkeypatch):
    monkeypatch.setenv("GROUNDINGDINO_CACHE", str(small_disk / "cache"))
    with pytest.raises(OSError, match=r"was to be converted into .*GROUNDINGDINO_CACHE") as problem:
        checkpoints.resolve(golden / "tiny/mmdet_checkpoint.pth")
    one_line(problem)
    assert [path.suffix for path in (small_disk / "cache/converted" / hub.CONVERSION).iterdir()] == [".lock"]


def test_a_read_only_disk_serves_what_is_in_its_cache(golden, small_disk, monkeypatch):
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    monkeypatch.setenv("GROUNDINGDINO_CACHE", str(small_disk))
    first = checkpoints.resolve(golden / "tiny/mmdet_checkpoint.pth")
    shutil.rmtree(small_disk / "digests", ignore_errors=True)  # which cannot be made again
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert checkpoints.resolve(golden / "tiny/mmdet_checkpoint.pth") == first
    with pytest.raises(OSError, match="cannot be written.*GROUNDINGDINO_CACHE") as problem:
        checkpoints.resolve(golden / "idea/idea_checkpoint.pth")
    one_line(problem)


def test_the_bytes_of_a_file_are_read_once(golden, cache, tmp_path, monkeypatch):
    source = tmp_path / "w.pth"
    shutil.copy(golden / "tiny/mmdet_checkpoint.pth", source)
    os.utime(source, (1e9, 1e9))
    first = checkpoints.resolve(source)
    with monkeypatch.context() as patch:
        patch.setattr("groundingdino.checkpoints.convert.file_digest", lambda files: pytest.fail("read again"))
        assert checkpoints.resolve(source) == first
    os.utime(source, (1e9 + 1, 1e9 + 1))
    asked = []
    monkeypatch.setattr(
        "groundingdino.checkpoints.convert.file_digest", lambda files: asked.append(files) or first.stem
    )
    assert checkpoints.resolve(source) == first and asked


def test_a_missing_file_is_not_replaced_by_the_one_beside_it(cache, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.pth: no such file; name .*model\.safetensors if that is") as problem:
        checkpoints.resolve(tmp_path / "model.pth")
    one_line(problem)
    config = dataclasses.replace(refcoco(), init_from=tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"no such file; name .*model\.safetensors"):
        initial_model(config)
