"""What the benchmarks count and compare. Nothing is timed here."""

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from op_checks import HAS_LINEAR_KERNEL
from safetensors.torch import save_file

benchmarks = pytest.importorskip("benchmarks.__main__", reason="benchmarks are not installed: run from the repository")
from benchmarks import matrix_bound, race, workload  # noqa: E402
from groundingdino.inputs.text import default_tokenizer, finish_caption  # noqa: E402
from groundingdino.ops import Linear, Windows, feed_forward, window_attention  # noqa: E402


def test_every_benchmark_that_is_listed_can_be_imported():
    for module, _ in benchmarks.BENCHMARKS.values():
        assert callable(importlib.import_module(f"benchmarks.{module}").main)


def test_the_hub_kernel_without_its_package_is_one_line_that_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "kernels", None)
    monkeypatch.setattr(sys, "argv", ["", "ms_deform_attn", "--hub-kernel"])
    with pytest.raises(SystemExit, match="^--hub-kernel needs the package kernels: pip install kernels$"):
        benchmarks.main()
    assert not capsys.readouterr().out


def test_matrix_work_of_a_linear_layer_and_its_gradients():
    rows, width, out = 6, 4, 5
    layer, x = torch.nn.Linear(width, out), torch.randn(2, rows // 2, width, requires_grad=True)
    with matrix_bound.MatrixWork() as work:
        layer(x).sum().backward()
    product = 2 * rows * width * out
    assert work.flops == 3 * product
    assert sum(work.shapes.values()) == 3 * product
    assert work.shapes[rows, width, out] == product


@pytest.mark.parametrize("inference", [False, True])
def test_matrix_work_of_attention_is_two_products_forward_and_five_backward(inference):
    batch, heads, queries, keys, width = 2, 3, 16, 24, 8
    query, key, value = (torch.randn(batch, heads, n, width, requires_grad=True) for n in (queries, keys, keys))
    product = 2 * batch * heads * queries * keys * width
    with torch.inference_mode(inference), matrix_bound.MatrixWork() as work:
        out = F.scaled_dot_product_attention(query, key, value)
        assert work.flops == 2 * product
        if not inference:
            out.sum().backward()
            assert work.flops == 7 * product


def test_matrix_work_of_the_operators_that_torch_has_no_formula_for():
    tokens, heads, channels, places = 10, 2, 4, 6  # two windows of six places, two of them padding
    token = torch.arange(2 * places).clamp(max=tokens).view(2, places)
    qkv, padding = torch.randn(1, tokens, 3, heads, channels, requires_grad=True), torch.zeros(3, heads, channels)
    windows = Windows(token, torch.arange(tokens), None)
    with matrix_bound.MatrixWork() as work:
        window_attention(qkv, padding, torch.zeros(heads, places, places), windows).sum().backward()
    assert work.flops == 7 * 2 * len(token) * heads * places * places * channels


@pytest.mark.skipif(not HAS_LINEAR_KERNEL, reason="nothing is computed again")
def test_matrix_work_of_a_feed_forward_block_is_two_products_forward_and_five_backward(kernels_for_all_sizes):
    rows, width, hidden = 600, 4, 8
    x, fc1, fc2 = torch.randn(rows, width, requires_grad=True), Linear(width, hidden), Linear(hidden, width)
    with matrix_bound.MatrixWork() as work:
        feed_forward(x, fc1, fc2, "gelu").sum().backward()
    assert work.flops == sum(work.shapes.values()) == 7 * 2 * rows * width * hidden


@pytest.mark.skipif(not HAS_LINEAR_KERNEL, reason="torch's own products are computed")
def test_matrix_work_of_our_own_linear_layers():
    x, weight, bias, back = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5), torch.randn(4, 5)
    with torch.inference_mode(), matrix_bound.MatrixWork() as work:
        torch.ops.groundingdino.linear(x, weight, bias, "gelu")
        assert work.flops == work.shapes[6, 4, 5] == 2 * 6 * 4 * 5
        torch.ops.groundingdino.feed_forward(x, weight, bias, back, torch.randn(4), "gelu")
    assert work.flops == 3 * work.shapes[6, 5, 4] == 3 * 2 * 6 * 4 * 5


def test_agreement_compares_boxes_as_sets(tmp_path):
    answer = {"scores": torch.rand(2, 300), "boxes": torch.rand(2, 300, 4)}
    order = torch.randperm(300)
    assert "100%" in agreement_of(tmp_path, answer, {name: x[:, order].contiguous() for name, x in answer.items()})


@pytest.mark.parametrize("differing", ["scores", "boxes", "which box has which score"])
def test_agreement_notices_what_differs(tmp_path, differing):
    answer = {"scores": torch.rand(2, 300), "boxes": torch.rand(2, 300, 4)}
    other = {name: x + 0.1 if name == differing else x for name, x in answer.items()}
    if differing not in answer:
        other["boxes"] = answer["boxes"].roll(1, dims=1)
    with pytest.raises(AssertionError):
        agreement_of(tmp_path, answer, other)


def agreement_of(folder, mine, theirs):
    """What `race.agreement` says of two answers."""
    files = [folder / "mine.safetensors", folder / "theirs.safetensors"]
    for file, answer in zip(files, (mine, theirs), strict=True):
        save_file(answer, file)
    return race.agreement(*files)


@pytest.mark.parametrize("tokens", [8, 64, 256])
def test_a_sentence_of_so_many_tokens_has_so_many(tokens):
    caption = finish_caption(workload.sentence_of(tokens))
    assert len(default_tokenizer().encode(caption).token_ids) == tokens
