"""Repositories of the Hugging Face hub by name, through huggingface_hub and against a server on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import Hub, asked
from safetensors.torch import load, load_file, save

from groundingdino import checkpoints, load_model
from groundingdino.checkpoints import hub, zoo
from groundingdino.checkpoints.convert import convert_file
from groundingdino.checkpoints.model_file import SOURCE_KEY, read_metadata

pytest.importorskip("huggingface_hub")
NAME = zoo.BY_NAME["llmdet-t"].hub[0]


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory) -> dict[str, bytes]:
    """The files of a repository with a model for transformers."""
    place = tmp_path_factory.mktemp("theirs")
    convert_file(golden / "tiny/mmdet_checkpoint.pth", place / "a.safetensors")
    convert_file(place / "a.safetensors", place / "folder", to="huggingface")
    return {path.name: path.read_bytes() for path in (place / "folder").iterdir()}


@pytest.fixture
def server(tmp_path, folder):
    """A hub with `NAME`."""
    with asked(tmp_path) as hub:
        hub.files[NAME] = {**folder, "other_weights.h5": b"not asked for"}
        yield hub


def one_line(problem: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(problem.value)
    return str(problem.value)


def test_a_repository_is_loaded_by_its_name_and_keeps_its_identity(server: Hub):
    assert not hub.is_cached(zoo.BY_NAME["llmdet-t"])
    predictor = load_model("llmdet-t", "cpu")
    assert predictor.model.config.decoder_layers == 2 and hub.is_cached(zoo.BY_NAME["llmdet-t"])
    source = json.loads(read_metadata(checkpoints.resolve(NAME))[SOURCE_KEY])
    assert source["hub"] == NAME and source["release"] == "LLMDet-T"
    assert not any(path.endswith("other_weights.h5") for _, path, _ in server.requests)
    fetched = len(server.downloads())
    checkpoints.resolve(NAME)
    assert len(server.downloads()) == fetched


def test_sharded_files_are_joined(server: Hub, folder):
    state, weight_map = load(folder["model.safetensors"]), {}
    whole = checkpoints.resolve(NAME)
    files = {name: content for name, content in folder.items() if name != "model.safetensors"}
    for i in range(2):
        part, file = sorted(state)[i::2], f"model-0000{i + 1}-of-00002.safetensors"
        files[file] = save({name: state[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    server.files["some-one/sharded"] = files
    found, expected = load_file(checkpoints.resolve("some-one/sharded")), load_file(whole)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    digests = [
        json.loads(read_metadata(checkpoints.resolve(name))[SOURCE_KEY])["tensors"]
        for name in (NAME, "some-one/sharded")
    ]
    assert digests[0] == digests[1]


def test_a_repository_with_one_file_of_weights_is_read_whatever_its_name(server: Hub, golden):
    server.files["some-one/mmdet"] = {
        "tiny.pth": (golden / "tiny/mmdet_checkpoint.pth").read_bytes(),
        "README.md": b"#",
    }
    assert checkpoints.resolve("some-one/mmdet").exists()
    server.files["some-one/many"] = {"tiny.pth": b"1", "base.pth": b"2"}
    with pytest.raises(ValueError, match=r"some-one/many: which of its weights\? \(base\.pth, tiny\.pth\)") as problem:
        checkpoints.resolve("some-one/many")
    one_line(problem)


@pytest.mark.parametrize("behaviour", ["slow", "503"])
def test_a_server_that_is_slow_or_busy_is_waited_for(server: Hub, behaviour, monkeypatch):
    server.behaviours = [behaviour] * 2
    try:
        found = checkpoints.resolve(NAME)
    except ValueError as error:  # huggingface_hub does not ask twice for a file: the next call does
        assert behaviour == "503" and "\n" not in str(error)
        found = checkpoints.resolve(NAME)
    assert found.exists()


def test_a_broken_download_goes_on_where_it_stopped(server: Hub, folder):
    server.files[NAME] = {"model.safetensors": folder["model.safetensors"]}
    server.behaviours = ["breaks off"]
    try:
        checkpoints.resolve(NAME)
    except ValueError as error:
        assert "\n" not in str(error)
        checkpoints.resolve(NAME)
    first, second = server.downloads()
    assert (
        first is None
        and 0 < int(second.removeprefix("bytes=").partition("-")[0]) <= len(folder["model.safetensors"]) // 2
    )


def test_a_wrong_file_is_refused_in_one_line(server: Hub):
    server.files[NAME] = {"model.safetensors": server.files[NAME]["model.safetensors"]}
    server.behaviours = ["wrong file"]
    with pytest.raises(ValueError, match="model.safetensors: ") as problem:
        checkpoints.resolve(NAME)
    one_line(problem)


@pytest.mark.parametrize("switch", ["GROUNDINGDINO_OFFLINE", "HF_HUB_OFFLINE"])
def test_the_offline_switches_ask_nothing_and_use_what_is_there(server: Hub, monkeypatch, switch):
    monkeypatch.setenv(switch, "1")
    with pytest.raises(
        ValueError, match=f"{NAME}: no such file, not in the cache of huggingface_hub.*forbids"
    ) as problem:
        checkpoints.resolve(NAME)
    assert f"fetch https://huggingface.co/{NAME} by hand" in one_line(problem) and not server.requests
    monkeypatch.delenv(switch)
    first = checkpoints.resolve(NAME)
    asked = len(server.requests)
    monkeypatch.setenv(switch, "1")
    assert checkpoints.resolve(NAME) == first and len(server.requests) == asked


def test_a_repository_that_is_not_there_is_one_line(server: Hub):
    with pytest.raises(ValueError, match="no-one/nothing: no such file, and the hub does not give it") as problem:
        checkpoints.resolve("no-one/nothing")
    one_line(problem)


@pytest.mark.slow
def test_two_processes_with_an_endpoint_of_their_own_fetch_each_file_once(server: Hub, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_mine"}
    environment["PYTHONPATH"] = str(Path(hub.__file__).parents[2])
    code = f"from groundingdino import checkpoints; print(checkpoints.resolve({NAME!r}))"
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in "12"
    ]
    found = {process.communicate(timeout=120)[0] for process in both}
    assert len(found) == 1 and Path(found.pop().strip()).exists()
    fetched = [path for method, path, _ in server.requests if method == "GET" and "/resolve/" in path]
    assert len(fetched) == len(set(fetched)) > 1
