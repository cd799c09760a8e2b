"""Whatever a transformers folder holds, its weights go over, or one line says what is wrong with it."""

import json
import shutil
from pathlib import Path

import pytest
from fuzz.fuzzing import damaged, outcome, run_cases
from fuzz.small_files import joined, small_checkpoint, split
from hypothesis import strategies as st

from groundingdino.checkpoints.convert import convert_file

CASES = 40
SHAPES = [[], [1], [0], [1, 1, 1, 1], [2, 3], [10**6], [1] * 70]


@st.composite
def models(draw: st.DrawFn, whole: bytes) -> bytes:
    """model.safetensors with a damaged header, or a tensor of another name, shape or type."""
    header, data = split(whole)
    kind = draw(st.sampled_from(["header", "name", "shape", "missing"]))
    if kind == "header":
        return joined(draw(damaged(header)), data)
    name = draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    entry = header.pop(name)
    if kind == "name":
        header[draw(st.sampled_from(["", "a" * 3000, "\x1b[2J", name.replace("0", "999999999"), name + ".x"]))] = entry
    elif kind == "shape":
        header[name] = {**entry, "shape": draw(st.sampled_from(SHAPES)), "dtype": draw(st.sampled_from(["F32", "I8"]))}
    return joined(header, data)


def test_any_folder_is_converted_or_one_line(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path).parent / "theirs"
    whole = (folder / "model.safetensors").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    header, _ = split(whole)
    index = {"metadata": {}, "weight_map": {name: "model-1.safetensors" for name in sorted(header)[:5]}}
    (tmp_path / "sharded").mkdir()
    shutil.copy(folder / "model.safetensors", tmp_path / "sharded" / "model-1.safetensors")

    def check(case: tuple[str, object]) -> None:
        kind, content = case
        place = tmp_path / "sharded" if kind == "index" else folder
        if kind == "index":
            (place / "model.safetensors.index.json").write_text(json.dumps(content))
        elif kind == "config":
            (place / "model.safetensors").write_bytes(whole)
            (place / "config.json").write_text(json.dumps(content))
        else:
            (place / "model.safetensors").write_bytes(content)
        outcome(lambda: convert_file(place, tmp_path / "b.safetensors"), str(place))

    cases = st.one_of(
        st.tuples(st.just("model"), models(whole)),
        st.tuples(st.just("config"), damaged(config)),
        st.tuples(st.just("index"), damaged(index)),
    )
    run_cases(request, cases, check, CASES)
