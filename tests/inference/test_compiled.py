"""A predictor whose model torch compiles. Where the compiler itself is not the point, its graphs run as they are."""

import functools
import pickle

import numpy as np
import pytest
import torch
from golden_cases import TINY, tiny_model
from torch._dynamo.utils import counters

from groundingdino.inference.compiled import CompiledDetector
from groundingdino.inference.predictor import Predictor
from groundingdino.inputs.text import collate_text, default_tokenizer
from groundingdino.model import build_detector

SIZES = ((96, 128), (128, 96), (128, 128), (97, 203), (160, 77))  # of images; the scale leaves them as they are
CAPTIONS = ("a cat", "the man in the red shirt on the left", "cup", "a cat", "second zebra from right")


@pytest.fixture(autouse=True)
def fresh_compiler(tmp_path, monkeypatch):
    """Nothing compiled before, in this process or on disk."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def graphs_run_as_they_are(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def noise(size):
    return np.random.default_rng(size).integers(0, 255, (*size, 3), dtype=np.uint8)


def predictors():
    """The model as it is, and compiled."""
    return (Predictor(tiny_model(), scale=(256, 256), compile=compiled) for compiled in (False, True))


def assert_same(found, expected):
    assert (found.scores - expected.scores).abs().max() < 1e-4
    assert (found.boxes - expected.boxes).abs().max() < 1e-4 * 256


@pytest.mark.slow
def test_three_graphs_answer_for_images_and_captions_of_all_sizes_and_two_more_for_padded_batches(
    graphs_run_as_they_are,
):
    plain, compiled = predictors()
    for size, caption in zip(SIZES, CAPTIONS, strict=True):
        expected, found = (p.predict(noise(size), referring=caption, top_k=50) for p in (plain, compiled))
        assert_same(found, expected)
    assert counters["stats"]["unique_graphs"] == 3
    images = [noise(size) for size in SIZES]
    for count in (2, 3):
        options = {"categories": ["cat", "dog", "red car"], "threshold": 0.0, "batch_size": count}
        for found, expected in zip(*(p.predict(images, **options) for p in (compiled, plain)), strict=True):
            assert_same(found, expected)
    assert counters["stats"]["unique_graphs"] == 5


@pytest.mark.slow
def test_a_compiled_predictor_comes_out_of_a_pickle_and_compiles_anew(graphs_run_as_they_are):
    plain, compiled = predictors()
    copied = pickle.loads(pickle.dumps(compiled))
    expected, found = (p.predict(noise(SIZES[0]), referring="a cat") for p in (plain, copied))
    assert_same(found, expected)
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.slow
@torch.no_grad()
def test_the_text_half_that_the_compiler_makes_equals_the_model_for_captions_of_any_length():
    model = tiny_model()
    compiled = CompiledDetector(model)
    for caption in CAPTIONS:
        text = collate_text([default_tokenizer().encode(f"{caption}.")])
        assert (compiled.encode_text(text) - model.encode_text(text)).abs().max() < 1e-4
    assert counters["stats"]["unique_graphs"] == 1


def test_without_a_c_compiler_one_line_says_so():
    compiled = CompiledDetector(tiny_model())
    text = collate_text([default_tokenizer().encode("a cat.")])
    wrong = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with (
        wrong,
        torch.no_grad(),
        pytest.raises(RuntimeError, match="could not be compiled, leave out compile=True") as e,
    ):
        compiled.encode_text(text)
    assert "\n" not in str(e.value)


def test_a_device_without_a_compiler_is_refused_before_anything_is_computed():
    with pytest.raises(ValueError, match="cpu and cuda, not on meta"):
        CompiledDetector(build_detector(TINY).to("meta"))
