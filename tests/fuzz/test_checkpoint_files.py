"""Whatever a checkpoint holds, a model is loaded that answers, or one line says what is wrong with the file."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz.fuzzing import ODD_VALUES, damaged, damaged_bytes, outcome, run_cases
from fuzz.small_files import joined, small_checkpoint, split
from hypothesis import strategies as st

from groundingdino.checkpoints.convert import convert_file
from groundingdino.checkpoints.model_file import CONFIG_KEY
from groundingdino.cli import main as command_line
from groundingdino.inference.predictor import load_model

CASES = 40
PHOTO = np.zeros((40, 40, 3), np.uint8)
TEXTS = [value for value in ODD_VALUES if isinstance(value, str)] + ["{}", "[]", "null", "[1]", "[" * 100_000, "1e999"]
NUMBERS = [float("nan"), float("inf"), 1e38]


@st.composite
def contents(draw: st.DrawFn, whole: bytes) -> bytes:
    """A checkpoint with a damaged header, config, metadata, tensor or byte."""
    header, data = split(whole)
    metadata = header["__metadata__"]
    kind = draw(st.sampled_from(["header", "config", "config", "metadata", "tensor", "bytes"]))
    if kind == "bytes":
        return draw(damaged_bytes(whole, busy=len(whole) - len(data)))
    if kind == "tensor":
        name = draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
        start = header[name]["data_offsets"][0]
        value = np.float32(draw(st.sampled_from(NUMBERS))).tobytes()
        return joined(header, data[:start] + value + data[start + 4 :])
    if kind == "config":
        config = draw(damaged(json.loads(metadata[CONFIG_KEY])))
        return joined({**header, "__metadata__": {**metadata, CONFIG_KEY: json.dumps(config)}}, data)
    if kind == "metadata":
        name, text = draw(st.sampled_from(sorted(metadata))), draw(st.sampled_from(TEXTS))
        return joined({**header, "__metadata__": {**metadata, name: text}}, data)
    return joined(draw(damaged(header)), data)


def test_any_checkpoint_is_a_model_or_one_line(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    whole = small_checkpoint(tmp_path).read_bytes()
    path = tmp_path / "a.safetensors"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        model = outcome(lambda: load_model(path, device="cpu"), str(path))
        if model is not None:
            found = outcome(lambda: model.predict(PHOTO, referring="a cat"))
            assert found is None or torch.isfinite(found.boxes).all()
        outcome(lambda: convert_file(path, tmp_path / "b.pth", to="mmdet"), str(path))
        with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
            assert command_line.main(["info", str(path)]) in (0, 2)
        assert errors.getvalue().count("\n") <= 1

    run_cases(request, contents(whole), check, CASES)
