"""Weights of mmdet's in and out: total, strict, bit-equal, and never running what a pickle asks for."""

import io
import json
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from groundingdino.checkpoints.convert import convert_file
from groundingdino.checkpoints.formats import mmdet
from groundingdino.checkpoints.formats.pytorch_file import Inert, read_pytorch_file
from groundingdino.checkpoints.model_file import load_detector
from groundingdino.config import MODEL_PRESETS, model_config_from_dict
from groundingdino.model import build_detector

ROOT = Path(__file__).parent.parent.parent
TAP_TOLERANCE = 1e-4  # absolute, float32: the project's bound for values that mmdet computed


@pytest.fixture(scope="module")
def theirs(golden) -> dict[str, torch.Tensor]:
    return torch.load(golden / "tiny/mmdet_checkpoint.pth", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "tiny.safetensors"
    convert_file(golden / "tiny/mmdet_checkpoint.pth", path)
    return path


def shapes_of(golden: Path, size: str) -> dict[str, tuple[int, ...]]:
    shapes = json.loads((golden / "mm_gdino_state_dict_shapes.json").read_text())[size]
    return {name: tuple(shape) for name, shape in shapes.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# The table


@pytest.mark.parametrize("size", MODEL_PRESETS)
def test_every_tensor_of_a_released_size_goes_over_and_back(golden, size):
    shapes = shapes_of(golden, size)
    config = mmdet.infer_config(shapes)
    assert config == MODEL_PRESETS[size]()
    native = mmdet.to_native({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    with torch.device("meta"):
        model = build_detector(config)
    assert {k: v.shape for k, v in native.items()} == {k: v.shape for k, v in model.state_dict().items()}
    back = mmdet.to_mmdet(native) | mmdet.mmdet_buffers(config)
    assert {name: tuple(tensor.shape) for name, tensor in back.items()} == shapes


def test_gradients_and_optimizer_groups_of_mmdet_find_their_parameters(golden):
    model_names = None
    for case in ("train_one_image", "train_mixed_batch", "train_empty_target"):
        tensors = load_file(golden / f"tiny/{case}.safetensors")
        gradients = {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
        assert gradients
        native = mmdet.to_native(gradients, decoder_layers=2)
        parameters = dict(tiny_model(golden).named_parameters())
        model_names = parameters.keys()
        assert all(native[name].shape == parameters[name].shape for name in native)
    groups = json.loads((golden / "tiny/optimizer_groups.json").read_text())
    names = {mmdet.native_name(name, decoder_layers=2) for name in groups}
    assert names == model_names


def tiny_model(golden):
    state = torch.load(golden / "tiny/mmdet_checkpoint.pth", weights_only=True)["state_dict"]
    with torch.device("meta"):
        return build_detector(mmdet.infer_config({name: tuple(tensor.shape) for name, tensor in state.items()}))


def test_the_converted_backbone_computes_what_mmdet_computes(golden, converted):
    case = load_file(golden / "tiny/infer_categories_single.safetensors")
    with torch.no_grad():
        maps = load_detector(converted).backbone(case["input"])
    for i, found in enumerate(maps):
        assert (found - case[f"backbone.{i}"]).abs().max() < TAP_TOLERANCE


def test_two_names_for_one_tensor_are_refused(theirs):
    assert mmdet.native_name("query_embedding.weight") == "query_embedding.weight"
    assert mmdet.native_name("query_embedding.bias") is None
    with pytest.raises(ValueError, match=r"1 tensors that MM-Grounding-DINO does not have: neck\.surprise"):
        mmdet.to_native({**theirs, "neck.surprise": torch.zeros(1)})


def test_permuting_to_ours_and_back_is_the_identity_and_not_nothing(theirs):
    native = mmdet.to_native(theirs)
    name = "backbone.stages.1.downsample.reduction.weight"
    assert not torch.equal(native[name], theirs[name])
    assert torch.equal(mmdet.to_mmdet(native)[name], theirs[name])


# Files


def test_a_converted_file_holds_all_that_the_model_needs(converted, theirs):
    with safe_open(converted, "pt") as file:
        metadata = file.metadata()
    config = model_config_from_dict(json.loads(metadata["groundingdino.config"]))
    assert (config.backbone.window_size, config.text.num_heads, config.num_points) == (12, 2, 4)
    source = json.loads(metadata["groundingdino.source"])
    assert source["file"] == "mmdet_checkpoint.pth" and len(source["sha256"]) == 64 and source["release"] is None
    assert equal(load_detector(converted).state_dict(), mmdet.to_native(theirs))


def test_converting_back_is_bit_equal_tensor_for_tensor(converted, theirs, tmp_path):
    report = convert_file(converted, tmp_path / "back.pth", to="mmdet")
    assert report.permuted == 9
    assert equal(torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"], theirs)


def test_the_position_ids_of_older_files_come_back_too(golden, theirs, tmp_path):
    name = "language_model.language_backbone.body.model.embeddings.position_ids"
    old = {**theirs, name: torch.arange(512)[None]}
    torch.save({"state_dict": old}, tmp_path / "old.pth")
    report = convert_file(tmp_path / "old.pth", tmp_path / "ours.safetensors")
    assert sorted(report.dropped.values()) == [1, 8]
    convert_file(tmp_path / "ours.safetensors", tmp_path / "back.pth", to="mmdet")
    assert equal(torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"], old)


def test_llmdets_language_model_is_left_out_by_name(theirs, converted, tmp_path):
    more = ("lmm.model.layers.0.mlp.up_proj.weight", "connector.0.weight", "region_connector.0.bias")
    more = (*more, "ref_point_head.layers.0.weight")
    extra = {name: torch.ones(2) for name in (*more, "image_seperate", "image_seperate.weight", "img_sep")}
    torch.save({"state_dict": {**theirs, **extra}}, tmp_path / "llmdet.pth")
    report = convert_file(tmp_path / "llmdet.pth", tmp_path / "llmdet.safetensors")
    assert report.dropped[mmdet.LLMDET_REASON] == 7 and "LLMDet's language model" in "\n".join(report.lines())
    assert equal(load_file(tmp_path / "llmdet.safetensors"), load_file(converted))
    torch.save({"state_dict": {**theirs, "lmmodel.weight": torch.ones(2)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"1 tensors that MM-Grounding-DINO does not have: lmmodel\.weight"):
        convert_file(tmp_path / "other.pth", tmp_path / "other.safetensors")


def test_the_report_accounts_for_every_tensor(golden, theirs, tmp_path):
    report = convert_file(golden / "tiny/mmdet_checkpoint.pth", tmp_path / "ours.safetensors")
    assert report.mapped + sum(report.dropped.values()) == len(theirs)
    assert (report.mapped, report.permuted) == (360, 9)
    text = "\n".join(report.lines())
    assert "5,746,653 parameters" in text and "relative_position_index: follows from the window size" in text


def test_what_a_runner_leaves_in_a_checkpoint_is_reported_and_not_needed(theirs, tmp_path):
    state = {f"module.{name}": torch.nn.Parameter(t) if t.is_floating_point() else t for name, t in theirs.items()}
    content = {"meta": {}, "state_dict": state, "optimizer": {"state": {0: torch.ones(3)}}, "message_hub": Path("x")}
    torch.save(content, tmp_path / "epoch_5.pth")
    report = convert_file(tmp_path / "epoch_5.pth", tmp_path / "ours.safetensors")
    assert equal(load_file(tmp_path / "ours.safetensors"), mmdet.to_native(theirs))
    text = "\n".join(report.lines())
    assert "not read: 'optimizer', 'message_hub'" in text and "never loaded or run: pathlib.PosixPath" in text


def test_a_name_that_promises_another_hash_is_pointed_out(golden, tmp_path):
    renamed = tmp_path / "grounding_dino_swin-b_pretrain_obj365_goldg_v3de-f83eef00.pth"
    renamed.write_bytes((golden / "tiny/mmdet_checkpoint.pth").read_bytes())
    report = convert_file(renamed, tmp_path / "ours.safetensors")
    assert any("promises a SHA-256 of f83eef00" in line for line in report.lines())


def test_weights_that_are_not_finite_are_pointed_out(theirs, tmp_path):
    report = convert_file(altered(theirs, tmp_path, level_embed=torch.full((4, 256), torch.nan)), tmp_path / "ours")
    assert any("1 tensors hold values that are not finite: level_embedding" in line for line in report.lines())


def test_the_heads_of_an_unusual_bert_can_be_given(theirs, tmp_path):
    report = convert_file(altered(theirs, tmp_path), tmp_path / "ours.safetensors", text_heads=4)
    assert report.config.text.num_heads == load_detector(tmp_path / "ours.safetensors").config.text.num_heads == 4


@pytest.mark.parametrize(("said", "taken"), [(4, 4), (0, 2), (-4, 2), (True, 2), ("4", 2)])
def test_the_heads_of_bert_are_taken_from_a_config_that_says_them_as_a_number(theirs, tmp_path, said, taken):
    source = altered(theirs, tmp_path)
    (source.parent / "config.json").write_text(json.dumps({"text_config": {"num_attention_heads": said}}))
    assert convert_file(source, tmp_path / "ours.safetensors").config.text.num_heads == taken


@pytest.mark.parametrize("to", ["mmdet", "huggingface"])
def test_a_target_that_does_not_fit_on_the_disk_leaves_nothing(converted, tmp_path, to):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a full disk: write() itself fails
    try:
        with pytest.raises(OSError, match=r"could not write .*nothing was left there"):
            convert_file(converted, tmp_path / "target", to=to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


# What is refused


def altered(theirs: dict, tmp_path: Path, **changes: torch.Tensor | None) -> Path:
    state = {**theirs, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    torch.save({"state_dict": {k: v for k, v in state.items() if v is not None}}, tmp_path / "altered.pth")
    return tmp_path / "altered.pth"


NOT_WHOLE = {
    "a missing tensor": ({"memory_trans_fc__bias": None}, r"1 missing \(query_selection\.fc\.bias\)"),
    "an unknown tensor": ({"memory_trans_fc__scale": torch.ones(1)}, r"1 tensors .*memory_trans_fc\.scale"),
    "a wrong shape": (
        {"memory_trans_fc__bias": torch.ones(255)},
        r"query_selection\.fc\.bias \(255,\) instead of \(256,\)",
    ),
    "no label embedding": ({"dn_query_generator__label_embedding__weight": None}, "label_embedding.weight' is missing"),
    "a number for a tensor": ({"level_embed": 3}, "'level_embed' among its weights is a int, not a tensor"),
    "a layer of a number that no list has": (
        {"decoder__layers__999999999__norms__0__bias": torch.ones(256)},
        r"'decoder\.layers\.999999999\.norms\.0\.bias' is number 999999999 of 3",
    ),
    "another vocabulary": (
        {"language_model__language_backbone__body__model__embeddings__word_embeddings__weight": torch.ones(99, 32)},
        "BERT knows 99 tokens, the packaged vocabulary .* has 30522",
    ),
    "a learned scale of one head alone": (
        {"bbox_head__cls_branches__0__log_scale": torch.ones(1)},
        r"2 missing \(query_selection\.contrastive_head\.log_scale, decoder\.contrastive_heads\.1\.log_scale\)",
    ),
    "weights of whole numbers": (
        {"memory_trans_fc__bias": torch.ones(256, dtype=torch.int8)},
        r"1 weights are not float64, 32, 16 or bfloat16: query_selection\.fc\.bias torch\.int8",
    ),
    "more tensors than bytes": (
        dict.fromkeys((f"spare{i}" for i in range(40)), torch.zeros(1_000_000)),  # one storage
        "damaged or made to fill the memory",
    ),
}


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_an_incomplete_or_foreign_tensor_set_is_refused(theirs, tmp_path, case):
    changes, message = NOT_WHOLE[case]
    assert_refused(altered(theirs, tmp_path, **changes), message)


OTHER_MODELS = {
    "a ResNet": ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "fc.weight"],
    "a plain BERT": ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight"],
    "GLIP": ["backbone.patch_embed.norm.weight", "language_model.x", "bbox_head.head.weight"],
    "an mmdet detector without a language model": ["backbone.layer1.0.conv1.weight", "bbox_head.fc_cls.weight"],
    "a Swin Transformer": ["patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight"],
    "an unknown model of 1 tensors (w)": ["w"],
}


@pytest.mark.parametrize("container", ["model", "state_dict", None])
@pytest.mark.parametrize("model", OTHER_MODELS)
def test_a_checkpoint_of_another_model_is_called_by_its_name(tmp_path, model, container):
    state = {name: torch.zeros(2) for name in OTHER_MODELS[model]}
    torch.save({container: state, "epoch": 3} if container else state, tmp_path / "other.pth")
    assert_refused(tmp_path / "other.pth", model.replace("(", r"\(").replace(")", r"\)"))


@pytest.mark.parametrize("container", ["state_dict", "model"])
def test_an_entry_that_is_only_called_like_a_dict_of_weights_is_refused_by_name(tmp_path, container):
    torch.save({container: "swin_t", "backbone.patch_embed.norm.weight": torch.zeros(2)}, tmp_path / "other.pth")
    assert_refused(tmp_path / "other.pth", f"{container!r} among its weights is a str, not a tensor")


def assert_refused(source: Path, message: str, folder: Path | None = None) -> None:
    target = (folder or source.parent / "target") / "out.safetensors"
    target.parent.mkdir()
    with pytest.raises(ValueError, match=message) as refusal:
        convert_file(source, target)
    assert "\n" not in str(refusal.value) and str(source) in str(refusal.value)
    assert not list(target.parent.iterdir())


NOT_CHECKPOINTS = {
    "an empty file": b"",
    "an HTML or XML page": b"\n<!DOCTYPE html><html>404</html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1",
    "a text file that begins with b'hello wo": b"hello world ~\t\r\n" * 100,
    "a gzip archive": b"\x1f\x8b\x08\0" + bytes(100),
    "not a PyTorch file": bytes(range(128, 256)),
    "not a PyTorch file .1 byte": b"\x7f",
    "a bare pickle": pickle.dumps({"state_dict": {}}),
}


@pytest.mark.parametrize("meaning", NOT_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_called_what_it_is(tmp_path, meaning):
    (tmp_path / "x.pth").write_bytes(NOT_CHECKPOINTS[meaning])
    assert_refused(tmp_path / "x.pth", f"x.pth: {meaning}.*; expected Grounding DINO weights")


def test_a_path_that_leads_nowhere_or_to_a_folder_is_refused(tmp_path):
    assert_refused(tmp_path / "nothing.pth", "no such file")
    (tmp_path / "target").rmdir()
    (tmp_path / "folder").mkdir()
    assert_refused(tmp_path / "folder", "a folder")


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused(golden, tmp_path, kept):
    content = (golden / "tiny/mmdet_checkpoint.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: int(len(content) * kept)])
    assert_refused(tmp_path / "cut.pth", "truncated or damaged PyTorch file")


def test_a_legacy_file_is_refused_with_the_way_to_rewrite_it(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_refused(tmp_path / "old.pth", r"before PyTorch 1\.6; rewrite it once with torch\.save")


def test_bad_targets_are_refused_before_any_work(golden, converted, tmp_path):
    source = golden / "tiny/mmdet_checkpoint.pth"
    with pytest.raises(ValueError, match="there is no folder"):
        convert_file(source, tmp_path / "nowhere/out.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        convert_file(source, tmp_path)
    with pytest.raises(ValueError, match="is the source itself"):
        convert_file(converted, converted, to="mmdet")
    with pytest.raises(ValueError, match="in native format already"):
        convert_file(converted, tmp_path / "again.safetensors")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists; name a folder to make"):
        convert_file(source, tmp_path / "there", to="huggingface")


def test_the_command_answers_in_one_line(tmp_path):
    command = [sys.executable, ROOT / "convert_checkpoint.py", "nowhere.pth", tmp_path / "out.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert "nowhere.pth" in done.stderr and done.stderr.count("\n") == 1


# The reader of pickles


class Calls:
    """Pickles as a call, as an attacker's object does."""

    def __init__(self, function, *args) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def test_a_malicious_pickle_is_inert(golden, theirs, tmp_path):
    flag = tmp_path / "executed"
    attacks = {
        "system": Calls(os.system, f"touch {flag}"),
        "exec": Calls(exec, f"open({str(flag)!r}, 'w')"),
        "path": Calls(Path.touch, flag),
    }
    torch.save({"state_dict": theirs, **attacks}, tmp_path / "evil.pth")
    report = convert_file(tmp_path / "evil.pth", tmp_path / "ours.safetensors")
    assert not flag.exists()
    assert any("never loaded or run" in line and "posix.system" in line for line in report.lines())
    torch.load(tmp_path / "evil.pth", weights_only=False)  # the attack itself is real
    assert flag.exists()


def test_a_malicious_weight_is_refused_by_name(theirs, tmp_path):
    torch.save({"state_dict": {**theirs, "level_embed": Calls(os.system, "true")}}, tmp_path / "evil.pth")
    assert_refused(tmp_path / "evil.pth", r"'level_embed' among its weights is a posix\.system, not a tensor")


def test_mmengines_training_checkpoint_is_read_without_mmengine(golden):
    file = read_pytorch_file(golden / "mmengine_training_checkpoint_excerpt.pth")
    state = file.content["state_dict"]
    assert [tuple(t.shape) for t in state.values()] == [(4, 256), (1,), (256,)]
    assert file.content["meta"]["epoch"] == 1 and file.content["optimizer"]["param_groups"][0]["lr"] == 1e-4
    assert isinstance(file.content["message_hub"]["log_scalars"]["train/loss"], Inert)
    assert "mmengine.logging.history_buffer.HistoryBuffer" in file.inert and "mmengine" not in sys.modules


def test_tensors_come_out_as_torch_load_gives_them(tmp_path):
    base = torch.randn(6, 5)
    content = {
        "view": base[1:3, ::2],
        "transposed": base.T,
        "parameter": torch.nn.Parameter(base),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        **{
            str(t): torch.ones(3, dtype=t)
            for t in (torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.float64)
        },
        **{str(t): torch.ones(3, dtype=t) for t in (torch.uint16, torch.complex64, torch.float8_e4m3fn)},
        "nested": [1.5, ("a", None, {"b": torch.arange(3)})],
        "module": torch.nn.BatchNorm1d(2).state_dict(),
    }
    torch.save(content, tmp_path / "a.pth")
    found = read_pytorch_file(tmp_path / "a.pth").content
    expected = torch.load(tmp_path / "a.pth", weights_only=True)
    for name, tensor in expected.items():
        if isinstance(tensor, torch.Tensor):
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
            assert found[name].tolist() == tensor.tolist(), name
    assert equal(found["module"], expected["module"])
    assert found["nested"][0] == 1.5 and torch.equal(found["nested"][1][2]["b"], torch.arange(3))


def rezipped(path: Path, target: Path, compression: int, edit=lambda name, data: data) -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            data = edit(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_file_that_was_compressed_is_refused_so_that_a_small_file_takes_little_memory(tmp_path, compression):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pth")
    rezipped(tmp_path / "whole.pth", tmp_path / "a.pth", compression)
    assert_refused(tmp_path / "a.pth", "its parts are compressed, which torch.save never does; rewrite it once with")


def save_with_pickle(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/data/0", bytes(16))
    return path


def tensor_pickle(size: tuple[int, ...], stride: tuple[int, ...], key: str = "0") -> bytes:
    """A pickle that rebuilds a float32 tensor over 16 stored bytes, with sizes of the caller's choice."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, key, "cpu", 4) if isinstance(value, Storage) else None

    out = io.BytesIO()
    Pickler(out, 2).dump({"a": Calls(torch._utils._rebuild_tensor_v2, Storage(), 0, size, stride, False, {})})
    return out.getvalue()


def test_a_tensor_inside_its_storage_is_read(tmp_path):
    file = read_pytorch_file(save_with_pickle(tmp_path / "a.pth", tensor_pickle((2, 2), (2, 1))))
    assert torch.equal(file.content["a"], torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("size", "stride", "key"),
    [((5,), (1,), "0"), ((2,), (4,), "0"), ((10**12,), (0,), "0"), ((2,), (-1,), "0"), ((4,), (1,), "1")],
)
def test_a_tensor_that_leaves_its_storage_is_refused(tmp_path, size, stride, key):
    path = save_with_pickle(tmp_path / "a.pth", tensor_pickle(size, stride, key))
    with pytest.raises(ValueError, match=r"a\.pth: (truncated or )?damaged PyTorch file"):
        read_pytorch_file(path)


BROKEN = {
    "empty": b"",
    "no pickle": b"garbage",
    "cut": b"\x80\x02}",
    "an attribute set on a function": b"\x80\x02cos\nsystem\nq\x00}b.",
    "nothing but a mark": b"\x80\x02(.",
    "a bytearray of a terabyte": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "a line break in a number": b"\x80\x02Fx\ty\r\n.",
    "a tuple nested 200,000 deep as a key": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
    "a tuple that holds itself twice, 60 times over, as a key": b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s.",
    "such a tuple as the second key of a dict": b"\x80\x02(K\x01K\x01)" + b"2\x86" * 9 + b"K\x01d.",
    "such a tuple among several items": b"\x80\x02}(K\x01K\x01)" + b"2\x86" * 9 + b"K\x01u.",
    "such a tuple in a set": b"\x80\x04\x8f()" + b"2\x86" * 60 + b"\x90.",
    "such a tuple in a frozenset": b"\x80\x04()" + b"2\x86" * 60 + b"\x91.",
    "such a tuple in an ordered dict": b"\x80\x02ccollections\nOrderedDict\n])" + b"2\x86" * 60 + b"K\x01\x86a\x85R.",
    "such a tuple as a reference": b"\x80\x02)" + b"2\x86" * 60 + b"Q.",
    "a shape that repeats a tuple": tensor_pickle((2**31, (1,)), (1, 1)),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_pickle_is_refused_in_one_line(tmp_path, content):
    with pytest.raises(ValueError, match=r"a\.pth: damaged PyTorch file") as refusal:
        read_pytorch_file(save_with_pickle(tmp_path / "a.pth", content))
    assert str(refusal.value).isprintable()


def test_a_bytearray_is_refused_before_its_size_is_believed(tmp_path):
    with pytest.raises(ValueError, match="a bytearray, whose size may be anything"):
        read_pytorch_file(save_with_pickle(tmp_path / "a.pth", BROKEN["a bytearray of a terabyte"]))


def test_what_an_object_of_another_class_returns_is_inert_too(tmp_path):
    content = read_pytorch_file(save_with_pickle(tmp_path / "a.pth", b"\x80\x02ca\nb\n)R)R.")).content
    assert isinstance(content, Inert)


def test_a_place_in_the_memo_costs_nothing_however_high_its_number(tmp_path):
    assert read_pytorch_file(save_with_pickle(tmp_path / "a.pth", b"\x80\x02}r\xff\xff\xff\x7f.")).content == {}


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_refused_without_waiting(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert_refused(tmp_path / name, "a pipe, expected a file")
    assert_refused(Path("/dev/zero"), "a device or a socket, expected a file", tmp_path / "second")


def test_a_damaged_archive_is_refused_in_one_line(golden, tmp_path):
    content = bytearray((golden / "mmengine_training_checkpoint_excerpt.pth").read_bytes())
    directory = content.rindex(b"PK\x01\x02")
    for offset, value in ((10, 99), (6, 250), (42, 255)):  # compression method, version needed, where the data lies
        damaged = bytearray(content)
        for entry in (content.index(b"PK\x01\x02"), directory):
            damaged[entry + offset] = value
        (tmp_path / "a.pth").write_bytes(damaged)
        with pytest.raises(ValueError, match="truncated or damaged PyTorch file|its parts are compressed"):
            read_pytorch_file(tmp_path / "a.pth")


def test_importing_the_converter_tables_stays_cheap():
    module = "groundingdino.checkpoints.formats.mmdet"
    code = f"import sys, {module}; print([m for m in ('timm', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"
