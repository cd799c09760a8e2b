"""Files of our own: atomic, pickle-free, strict, and interchangeable with the safetensors library."""

import json
import math
import os
import random
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

from groundingdino.checkpoints import model_file, run_state, safetensors_file
from groundingdino.checkpoints.formats.upgrade import upgrade
from groundingdino.checkpoints.model_file import load_detector, read_metadata, save_checkpoint, save_detector
from groundingdino.checkpoints.run_state import load_state, save_state
from groundingdino.checkpoints.safetensors_file import DTYPES, HEADER_LIMIT, TensorFile
from groundingdino.config import BackboneConfig, ModelConfig, TextConfig, TrainConfig
from groundingdino.inference.predictor import load_model
from groundingdino.model import build_detector
from groundingdino.training.setup import initial_model


def tensors_of_every_kind() -> dict[str, torch.Tensor]:
    made = {f"of {name}": torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    return made | {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(3, 5).T,
        "view": torch.randn(10)[::3],
    }


def test_the_safetensors_library_reads_what_we_write(tmp_path):
    tensors = tensors_of_every_kind()
    save_checkpoint(tmp_path / "a.safetensors", tensors, {"key": "value"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_we_read_what_the_safetensors_library_writes(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of_every_kind().items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"key": "value"})
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"key": "value"}
        assert file.entries.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert file.read(name).dtype == tensor.dtype and torch.equal(file.read(name), tensor), name


def test_a_write_that_fails_halfway_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"a": torch.ones(3)}, {})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a full disk: write() itself fails
    try:
        with pytest.raises(OSError, match=r"could not write .*a\.safetensors.*as it was"):
            save_checkpoint(path, {"a": torch.ones(1_000_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_slow_write_shows_the_other_processes_that_it_goes_on(tmp_path, monkeypatch):
    signs, flushes, fsync = [], [], os.fsync
    monkeypatch.setattr(safetensors_file.distributed, "note_progress", lambda: signs.append(1))
    monkeypatch.setattr(safetensors_file, "FLUSHED_AT_ONCE", 100)
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushes.append(1) or fsync(descriptor))
    save_state(tmp_path / "a.state", {str(k): torch.ones(20) for k in range(4)})
    assert len(signs) == 4 and len(flushes) == 2 + 2  # after 160 and 320 bytes; the whole file, the folder
    assert load_state(tmp_path / "a.state")["3"].sum() == 20


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OSError, match="could not write .*nowhere.*No such file"):
        save_checkpoint(tmp_path / "nowhere" / "a.safetensors", {}, {})


@pytest.mark.parametrize("cut", [3, 100, -10])
def test_a_truncated_file_is_called_so(tmp_path, cut):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"a": torch.ones(100)}, {"key": "x" * 500})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a\.safetensors: (truncated|not a) safetensors file"):
        TensorFile(path)


def write_header(path, header: object, data: int = 0) -> None:
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(data))


def four(start: int, shape: object = (4,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + 16]}


DAMAGED = {
    "an offset that lies": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}},
    "two tensors in one place": {"a": four(0), "b": four(0), "c": four(16)},
    "a gap": {"a": four(0), "b": four(32)},
    "a shape of floats": {"a": four(0, [4.0])},
    "a shape of truths": {"a": four(0, [4, True])},
    "a shape that is a text": {"a": four(0, "4")},
    "a negative shape": {"a": four(0, [-2, -2])},
    "offsets that are null": {"a": {**four(0), "data_offsets": None}},
    "an unknown dtype": {"a": four(0, [16], "F8_E4M3")},
    "a dtype that is a list": {"a": four(0, [4], ["F32"])},
    "a list for a tensor": {"a": [4]},
    "metadata of numbers": {"__metadata__": {"a": 1}},
    "metadata that is a list": {"__metadata__": ["a"]},
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header_is_refused_in_one_line(tmp_path, case):
    write_header(tmp_path / "a.safetensors", DAMAGED[case], 48)
    with pytest.raises(ValueError, match="damaged safetensors header") as refusal:
        TensorFile(tmp_path / "a.safetensors")
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 500


def test_a_file_without_tensors_is_a_file(tmp_path):
    write_header(tmp_path / "a.safetensors", {})
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert not file.entries and load_file(tmp_path / "a.safetensors") == {}


def test_a_header_nested_without_end_is_refused(tmp_path):
    encoded = b'{"a":' + b"[" * 100_000
    (tmp_path / "a.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    with pytest.raises(ValueError, match="damaged safetensors header"):
        TensorFile(tmp_path / "a.safetensors")


def test_a_file_longer_than_its_header_says_is_refused(tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", {"a": torch.ones(3)}, {})
    with open(tmp_path / "a.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="damaged safetensors file, .* bytes instead of"):
        TensorFile(tmp_path / "a.safetensors")


def test_a_file_cut_while_it_is_open_is_not_read_as_zeros(tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", {"a": torch.ones(100_000)}, {})
    with TensorFile(tmp_path / "a.safetensors") as file:
        os.truncate(tmp_path / "a.safetensors", 100_000)
        with pytest.raises(ValueError, match="truncated while it was read, at tensor 'a'"):
            file.read("a")


def training_state() -> dict:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": {"python": random.getstate(), "torch": torch.get_rng_state()},
        "best": math.inf,
        "seen": (1, [None, True, "text", {"tensor": torch.zeros(()), "dict": {}}]),
        1: {"1": 0.1 + 0.2},
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_training_state_comes_back_with_every_type_and_bit(tmp_path):
    state = training_state()
    save_state(tmp_path / "state.safetensors", state)
    assert same(state, load_state(tmp_path / "state.safetensors"))


def test_a_training_state_restores_an_optimizer(tmp_path):
    save_state(tmp_path / "state.safetensors", training_state())
    found = load_state(tmp_path / "state.safetensors")
    optimizer = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters(), lr=0.5)
    optimizer.load_state_dict(found["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 0.1
    random.setstate(found["rng"]["python"])


def test_what_a_training_state_cannot_hold_is_named_by_its_place(tmp_path):
    with pytest.raises(ValueError, match=r"state\.'a'\.1 is a set"):
        save_state(tmp_path / "s", {"a": [1, {2}]})
    with pytest.raises(ValueError, match=r"state\.'a' has a key of type tuple"):
        save_state(tmp_path / "s", {"a": {(1, 2): 3}})
    assert not list(tmp_path.iterdir())


def test_a_training_state_that_was_altered_is_refused(tmp_path):
    save_state(tmp_path / "state", training_state())
    content = bytearray((tmp_path / "state").read_bytes())
    content[-100] ^= 1  # one bit of a tensor
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(ValueError, match="damaged or altered since it was written"):
        load_state(tmp_path / "state")


@pytest.mark.parametrize("version", ["1", "2", "4", "x"])
def test_a_training_state_of_another_version_is_refused_with_what_to_do(tmp_path, version):
    save_checkpoint(tmp_path / "old", {}, {run_state.STATE_VERSION_KEY: version, run_state.STATE_KEY: '{"dict": []}'})
    with pytest.raises(ValueError, match=f"of version {version}, this groundingdino reads 3: finish that run"):
        load_state(tmp_path / "old")


def test_a_training_state_and_a_model_are_not_mistaken_for_each_other(tmp_path):
    save_state(tmp_path / "state.safetensors", {"step": 1})
    with pytest.raises(ValueError, match="the state of a training run, not a model"):
        read_metadata(tmp_path / "state.safetensors")
    save_checkpoint(tmp_path / "model.safetensors", {"a": torch.ones(1)}, {model_file.CONFIG_KEY: "{}"})
    with pytest.raises(ValueError, match="not the state of a training run"):
        load_state(tmp_path / "model.safetensors")


# Models

TINY = ModelConfig(
    "tiny",
    BackboneConfig(16, (1, 1, 1, 1), (1, 2, 4, 8), 4),
    TextConfig(32, 1, 2, 64, vocabulary=100, max_positions=64),
    width=32,
    ffn_width=32,
    text_layer_ffn_width=32,
    fusion_width=32,
    enhancer_layers=1,
    decoder_layers=1,
    num_queries=10,
    num_labels=16,
)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = build_detector(TINY)
    save_detector(tmp_path / "model.safetensors", model, {"note": "kept"})
    return tmp_path / "model.safetensors", model


def rewrite(path, metadata=(), **tensors):
    """The same file with other metadata or tensors; None drops one."""
    found, meta = load_file(path), read_metadata(path)
    content = {k: v for k, v in (found | tensors).items() if v is not None}
    save_checkpoint(path, content, {k: v for k, v in {**meta, **dict(metadata)}.items() if v is not None})


def test_a_model_comes_back_from_its_file_alone(saved):
    path, model = saved
    found = load_detector(path)
    assert found.config == TINY and not found.training and read_metadata(path)["note"] == "kept"
    assert same(dict(model.state_dict()), dict(found.state_dict()))
    assert all(p.requires_grad and not p.is_meta for p in found.parameters())
    assert not any(buffer.is_meta for buffer in found.buffers())


def test_a_loaded_model_does_not_depend_on_its_file(saved):
    path, model = saved
    found = load_detector(path)
    with open(path, "r+b") as file:  # as `cp other.safetensors path` would: same file, other bytes
        file.truncate(0)
    assert same(dict(model.state_dict()), dict(found.state_dict()))


def test_weights_stored_in_half_precision_load_as_float32(saved):
    path, model = saved
    rewrite(path, **{name: tensor.half() for name, tensor in load_file(path).items()})
    found = load_detector(path)
    assert all(p.dtype == torch.float32 for p in found.parameters())
    assert torch.equal(found.level_embedding, model.level_embedding.half().float())


FIRST_VERSIONS = {  # what 0.1.0 wrote for a layer of BERT: {today's: its}
    "attention.in_proj_": ("query.", "key.", "value."),
    "attention.out_proj.": ("attention_out.",),
    "ffn.fc1.": ("ffn_in.",),
    "ffn.fc2.": ("ffn_out.",),
}


def as_version_1(tensors):
    written = {}
    for name, tensor in tensors.items():
        part = next((part for part in FIRST_VERSIONS if f"text_encoder.layers.0.{part}" in name), None)
        theirs = FIRST_VERSIONS.get(part, (part,))
        for old, piece in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            written[name.replace(part, old) if part else name] = piece.contiguous()
    return written


def test_a_checkpoint_of_the_first_version_loads_and_converts_bit_for_bit(saved, tmp_path):
    path, model = saved
    old = tmp_path / "old.safetensors"
    save_checkpoint(old, as_version_1(load_file(path)), {**read_metadata(path), model_file.VERSION_KEY: "1"})
    assert "text_encoder.layers.0.query.weight" in load_file(old)
    assert same(dict(model.state_dict()), dict(load_detector(old).state_dict()))
    assert same(load_file(path), upgrade(load_file(old), "1"))
    cut = {name: tensor for name, tensor in load_file(old).items() if not name.endswith("0.key.weight")}
    save_checkpoint(old, cut, read_metadata(old))
    with pytest.raises(ValueError, match=r"in_proj_weight \(64, 32\) instead of \(96, 32\)"):
        load_detector(old)


WRONG = {
    "version 99, this groundingdino reads 1 and 2: upgrade": ({model_file.VERSION_KEY: "99"}, {}),
    "another vocabulary": ({model_file.VOCABULARY_KEY: "0" * 64}, {}),
    "not a model config of this version": ({model_file.CONFIG_KEY: '{"name": "x"}'}, {}),
    r"1 missing \(level_embedding\)": ({}, {"level_embedding": None}),
    r"1 unexpected \(surprise\)": ({}, {"surprise": torch.ones(1)}),
    r"level_embedding \(4, 31\) instead of \(4, 32\)": ({}, {"level_embedding": torch.ones(4, 31)}),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_file_that_does_not_fit_is_refused_in_one_line(saved, message):
    path, _ = saved
    metadata, tensors = WRONG[message]
    rewrite(path, metadata, **tensors)
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{message}") as refusal:
        load_detector(path)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_not_ours_is_refused_with_the_way_to_convert_it(golden, tmp_path):
    with pytest.raises(ValueError, match=r"a PyTorch file.*convert_checkpoint\.py .*mmdet_checkpoint\.pth OUT"):
        load_detector(golden / "tiny/mmdet_checkpoint.pth")
    save_file({"conv1.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"safetensors of another program \(1 tensors: conv1\.weight\)"):
        load_detector(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no such file"):
        load_detector(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="a folder"):
        load_detector(tmp_path)


# Configs and weights that cannot be

BAD_FIELDS = {
    "decoder_layers": 10**9,
    "enhancer_layers": 0,
    "num_heads": 8.0,
    "width": True,
    "num_levels": "4",
    "num_queries": -1,
    "fusion_dropout": math.nan,
    "box_eps": math.inf,
    "name": ["x"],
    "backbone": None,
    "text": [],
}
BAD_BACKBONE = {"depths": [2, 2, 10**6, 2], "num_heads": [], "window_size": None, "out_stages": [0.5], "surprise": 1}


@pytest.mark.parametrize("field", [*BAD_FIELDS, *(f"backbone.{name}" for name in BAD_BACKBONE)])
def test_a_config_field_of_another_type_or_size_is_refused_before_anything_is_built(saved, field):
    path, _ = saved
    config = json.loads(read_metadata(path)[model_file.CONFIG_KEY])
    if field.startswith("backbone."):
        config["backbone"][field.removeprefix("backbone.")] = BAD_BACKBONE[field.removeprefix("backbone.")]
    else:
        config[field] = BAD_FIELDS[field]
    rewrite(path, {model_file.CONFIG_KEY: json.dumps(config)})
    with pytest.raises(ValueError, match="not a model config") as refusal:
        load_detector(path)
    assert str(refusal.value).isprintable() and field.rpartition(".")[2] in str(refusal.value).lower()


@pytest.mark.parametrize("content", ["[]", "null", "3", '"x"', "{", "[" * 100_000, '{"backbone": 1e999}'])
def test_a_config_that_is_no_object_is_refused(saved, content):
    path, _ = saved
    rewrite(path, {model_file.CONFIG_KEY: content})
    with pytest.raises(ValueError, match=r"model\.safetensors") as refusal:
        load_detector(path)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_unless_asked_for(saved, value):
    path, _ = saved
    rewrite(path, level_embedding=torch.full((4, 32), value))
    with pytest.raises(ValueError, match="not finite: 'level_embedding' holds NaN or infinity"):
        load_detector(path)
    with pytest.raises(ValueError, match="not finite: 'level_embedding' holds NaN or infinity"):
        load_model(path, "cpu")
    with pytest.raises(ValueError, match="not finite: 'level_embedding' holds NaN or infinity"):
        initial_model(TrainConfig(TINY, init_from=path))
    assert not initial_model(TrainConfig(TINY, init_from=path, init_nonfinite=True)).level_embedding.isfinite().any()
    assert not load_model(path, "cpu", allow_nonfinite=True).model.level_embedding.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64])
def test_weights_of_whole_numbers_are_refused(saved, dtype):
    path, _ = saved
    rewrite(path, level_embedding=torch.ones(4, 32, dtype=dtype))
    with pytest.raises(ValueError, match="1 weights are not floating-point numbers: level_embedding"):
        load_detector(path)


@pytest.mark.parametrize("header", [b"[1]", (HEADER_LIMIT + 1).to_bytes(8, "little")])
def test_a_header_that_is_none_or_too_long_is_not_parsed(tmp_path, header):
    path = tmp_path / "a.safetensors"
    if len(header) == 8:
        path.write_bytes(header + b"{" + b" " * HEADER_LIMIT)
    else:
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="not a safetensors file"):
        TensorFile(path)
