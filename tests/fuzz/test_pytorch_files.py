"""Whatever a PyTorch file holds, its weights go over, or one line says what is wrong with it."""

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.fuzzing import ODD_VALUES, damaged_bytes, outcome, run_cases
from fuzz.small_files import small_checkpoint
from hypothesis import strategies as st
from torch import Tensor

from groundingdino.checkpoints.convert import convert_file
from groundingdino.checkpoints.formats.pytorch_file import read_pytorch_file

CASES = 60
DTYPES = [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float16, torch.bfloat16]
CHANGES = [
    *(lambda t, dtype=dtype: t.to(dtype) for dtype in DTYPES),
    lambda t: t[:0],
    lambda t: t[None],
    lambda t: t.reshape(-1)[:1].reshape(()),
    lambda t: torch.full_like(t, float("nan")),
    lambda t: t.reshape(-1)[:1].expand(t.shape),
    lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    lambda t: t.to_sparse(),
    lambda t: torch.nn.Parameter(t),
    lambda t: t.to("meta"),
]
NAMES = ["", "x" * 5000, "\x1b[2J", "backbone.norm999999999999.weight", "decoder.layers.7.norms.0.bias", "module.", "é"]


def saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@st.composite
def states(draw: st.DrawFn, state: dict[str, Tensor]) -> bytes:
    """The weights with one of another kind, missing, under another name, or in an odd container."""
    state = dict(state)
    name = draw(st.sampled_from(sorted(state)))
    kind = draw(st.sampled_from(["tensor", "name", "value", "missing", "container"]))
    if kind == "tensor":
        state[name] = draw(st.sampled_from(CHANGES))(state[name])
    elif kind == "value":
        state[name] = draw(st.sampled_from(ODD_VALUES))
    else:
        tensor = state.pop(name)
        if kind == "name":
            state[draw(st.sampled_from([*NAMES, 5, None, ("a", 1)]))] = tensor
    if kind == "container":
        return saved({"state_dict": draw(st.sampled_from([state, [state], state | {"meta": 1}, None, 5, {}]))})
    return saved({"state_dict": state, "meta": draw(st.sampled_from(ODD_VALUES))})


@st.composite
def programs(draw: st.DrawFn) -> bytes:
    """A pickle of random instructions in the archive of a PyTorch file."""
    codes = [code.code.encode("latin1") for code in pickletools.opcodes]
    piece = st.one_of(
        st.sampled_from(codes),
        st.sampled_from([b"}", b"]", b")", b"(", b"K\x01", b"0", b"2", b"s", b"u", b"a", b"R", b"b", b"Q", b"\x85"]),
        st.sampled_from([pickle.dumps(value, 2)[2:-1] for value in ODD_VALUES[:20]]),
        st.sampled_from([b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"]),
        st.sampled_from([b"ctorch\nFloatStorage\n", b"ctorch\nfloat32\n", b"cnumpy\nndarray\n"]),
        st.sampled_from([b"cos\nsystem\n", b"c__builtin__\neval\n", b"X\x04\x00\x00\x00true", b"\x8c\x01a\x93"]),
        st.binary(max_size=6),
    )
    body = b"".join(draw(st.lists(piece, max_size=40))) * draw(st.sampled_from([1, 1, 1, 2000]))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + body + draw(st.sampled_from([b".", b""])))
        archive.writestr("a/data/0", bytes(16))
    return stream.getvalue()


def test_any_pytorch_file_is_converted_or_one_line(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    whole = small_checkpoint(tmp_path).with_suffix(".pth").read_bytes()
    state = torch.load(tmp_path / "small.pth", weights_only=True)["state_dict"]
    few = saved({"state_dict": {name: tensor[:1] for name, tensor in state.items() if tensor.dim()}})
    path = tmp_path / "a.pth"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        outcome(lambda: read_pytorch_file(path), str(path))
        outcome(lambda: convert_file(path, tmp_path / "b.safetensors"), str(path))

    cases = st.one_of(states(state), programs(), damaged_bytes(few), damaged_bytes(whole))
    run_cases(request, cases, check, CASES)
