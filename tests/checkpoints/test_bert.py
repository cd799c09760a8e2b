"""A trained BERT goes into the text encoder of a fresh model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from training_runs import SMALL, small_config

from groundingdino.checkpoints.bert import read_bert
from groundingdino.inputs.text import VOCABULARY_FILE
from groundingdino.training.setup import initial_model

WIDTH, LAYERS, FFN, WORDS, POSITIONS = 24, 2, 40, 30522, 128


def write_bert(folder: Path, prefix: str = "", **changes: Any) -> Path:
    """A BERT in transformers' layout, with a pooler."""
    folder.mkdir(exist_ok=True)
    shapes = {
        "embeddings.word_embeddings.weight": (WORDS, WIDTH),
        "embeddings.position_embeddings.weight": (POSITIONS, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "pooler.dense.weight": (WIDTH, WIDTH),
    }
    norms = ["embeddings.LayerNorm"]
    for n in range(LAYERS):
        layer = f"encoder.layer.{n}"
        dense = {f"attention.self.{part}": (WIDTH, WIDTH) for part in ("query", "key", "value")}
        dense |= {"attention.output.dense": (WIDTH, WIDTH), "intermediate.dense": (FFN, WIDTH)}
        for name, shape in {**dense, "output.dense": (WIDTH, FFN)}.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}  # type: ignore[dict-item]
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    shapes |= {f"{norm}.{part}": (WIDTH,) for norm in norms for part in ("weight", "bias")}  # type: ignore[misc]
    generator = torch.Generator().manual_seed(0)
    save_file(
        {prefix + name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    config = {
        "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 3, "intermediate_size": FFN,
        "vocab_size": WORDS, "max_position_embeddings": POSITIONS, "model_type": "bert", "hidden_act": "gelu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    (folder / "vocab.txt").write_bytes(VOCABULARY_FILE.read_bytes())
    return folder


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_fresh_model_gets_the_sizes_and_the_weights_of_a_bert(prefix: str, tmp_path: Path) -> None:
    text, weights = read_bert(write_bert(tmp_path / "bert", prefix))
    assert (text.width, text.num_layers, text.num_heads, text.ffn_width, text.max_positions) == (24, 2, 3, 40, 128)
    model = initial_model(dataclasses.replace(small_config(tmp_path, tmp_path), text_from=tmp_path / "bert"))
    state = model.text_encoder.state_dict()
    assert model.config.text == text and model.config.width == SMALL.width
    assert {name for name in state if name not in weights} == {"projection.weight", "projection.bias"}
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert weights["layers.1.attention.in_proj_weight"].shape == (72, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu', our text encoder has 'gelu'"),
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"hidden_size": "wide"}, "not the config of a BERT"),
    ],
)
def test_what_is_no_bert_of_ours_is_refused_in_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_bert(write_bert(tmp_path / "bert", **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "at odds with itself"),
        ({"num_hidden_layers": LAYERS - 1}, r"12 unexpected \(layers\.1\."),
        ({"num_hidden_layers": LAYERS + 1}, r"12 missing \(layers\.2\."),
        ({"intermediate_size": 2 * FFN}, r"6 of another shape \(layers\.0\.ffn\.fc1\.weight \(40, 24\) instead of"),
    ],
)
def test_a_bert_whose_config_fits_no_encoder_or_not_its_weights_is_refused_in_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_bert(tmp_path / "bert", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        initial_model(dataclasses.replace(small_config(tmp_path, tmp_path), text_from=folder))
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    (write_bert(tmp_path / "bert") / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    with pytest.raises(ValueError, match="not bert-base-uncased's vocabulary"):
        read_bert(tmp_path / "bert")


def test_a_config_that_is_nested_too_deeply_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ValueError, match="config.json: not the config of a BERT"):
        read_bert(tmp_path)
