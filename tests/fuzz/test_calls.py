"""Whatever a Python call is given, it answers or raises one sentence, before anything is computed with it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz.fuzzing import ODD_VALUES, outcome, run_cases
from golden_cases import tiny_model
from hypothesis import strategies as st
from PIL import Image

from groundingdino.inference.predictor import Predictor, load_model
from groundingdino.inference.prompts import Categories, Phrases, Referring, Spans

CASES = 100
PHOTO = np.full((30, 40, 3), 90, np.uint8)
ENDLESS: list = []
ENDLESS.append(ENDLESS)
DTYPES = [torch.uint8, torch.int64, torch.bool, torch.float16, torch.float8_e4m3fn, torch.complex64]
SHAPES = [(), (0,), (3,), (3, 8, 8), (8, 8, 3), (3, 0, 8), (2, 3, 8, 8), (1, 1, 1, 1, 1), (4, 8, 8)]
KINDS = [
    lambda t: t,
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: t.numpy(),
    lambda t: t.requires_grad_(),
    lambda t: t / 0,
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
]
OTHERS = [PHOTO, Image.new("RGB", (0, 3)), Image.new("F", (9, 9)), b"cat", object(), len, ENDLESS, {1}, range(3), 1j]
GOOD = ["a cat", ["a cat", "dog"], "cat . dog", 0.2, 3, ("a cat", [[(0, 5)]]), [[(0, 5)]], None, "max", "subject"]
NAMES = ["images", "prompts", "categories", "phrases", "spans", "referring", "scoring", "threshold", "top_k", "nms"]
OPTIONS = ["nms_per_label", "batch_size"]


@st.composite
def tensors(draw: st.DrawFn) -> Any:
    """A tensor or array of any shape, type and layout that torch has."""
    tensor = torch.ones(draw(st.sampled_from(SHAPES)))
    try:
        return draw(st.sampled_from(KINDS))(tensor.to(draw(st.sampled_from(DTYPES))))
    except (RuntimeError, TypeError):
        return tensor


def leaves() -> st.SearchStrategy[Any]:
    plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5))
    return st.one_of(plain, st.sampled_from([*ODD_VALUES, *OTHERS]), st.sampled_from(GOOD), tensors())


def values() -> st.SearchStrategy[Any]:
    """Anything, and anything inside of lists, tuples, dicts and prompts."""

    def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        prompts = [inner.map(kind) for kind in (Categories, Phrases)]
        pairs = [st.tuples(inner, inner).map(lambda two, kind=kind: kind(*two)) for kind in (Referring, Spans)]
        lists = [st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(st.text(max_size=2), inner)]
        return st.one_of(*prompts, *pairs, *lists)

    return st.recursive(leaves(), containers, max_leaves=4)


def calls() -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """A method and arguments, most of them good."""
    odd = st.dictionaries(st.sampled_from([*NAMES, *OPTIONS]), values(), min_size=1, max_size=3)
    predict = odd.map(lambda given: ("predict", {"images": PHOTO, "referring": "a cat", **given}))
    alone = odd.map(lambda given: ("predict", {"images": PHOTO, **given}))
    each = st.tuples(values(), values()).map(lambda two: ("predict_each", {"images": two[0], "prompts": two[1]}))
    load = st.fixed_dictionaries(
        {"path": values()},
        optional={"device": st.one_of(st.just("cpu"), values()), "precision": values(), "scale": values()},
    ).map(lambda given: ("load_model", given))
    return st.one_of(predict, alone, each, load)


def test_any_call_answers_or_raises_one_sentence(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GROUNDINGDINO_OFFLINE", "1")
    predictor = pickle.loads(pickle.dumps(Predictor(tiny_model(), scale=(32, 48))))

    def check(call: tuple[str, dict[str, Any]]) -> None:
        name, arguments = call
        function = load_model if name == "load_model" else getattr(predictor, name)
        outcome(lambda: function(**copy.copy(arguments)), refusals=(ValueError, TypeError))

    run_cases(request, calls(), check, CASES)
