"""Model configs from files are checked, field by field, before a model is built from them."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest

from groundingdino.config import (
    MODEL_PRESETS,
    ModelConfig,
    check_train_config,
    model_config_from_dict,
    model_config_to_dict,
    quickstart_model,
    small_model,
)
from groundingdino.training.recipes import TRAIN_PRESETS, quickstart

PRESETS = {**MODEL_PRESETS, "quickstart": quickstart_model, "small": small_model}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_a_file(name: str) -> None:
    config = PRESETS[name]()
    assert model_config_from_dict(json.loads(json.dumps(model_config_to_dict(config)))) == config


WRONG = {
    "missing": [("backbone", None), ("name", None), ("backbone.depths", None)],
    "Expected": [
        ("decoder_layers", 1_000_000_000),
        ("num_levels", 1_000_000),
        ("num_heads", 0),
        ("width", -256),
        ("width", 256.5),
        ("width", True),
        ("fusion_dropout", float("inf")),
        ("fusion_dropout", float("nan")),
        ("backbone.depths", [2, 2, 1_000_000, 2]),
        ("backbone.depths", []),
        ("backbone.depths", [[2]]),
        ("backbone", []),
        ("text", 3),
        ("name", 7),
        ("text.num_layers", "12"),
    ],
    "unknown": [("colour", 1), ("backbone.colour", 1), ("text.colour", 1)],
    "at odds": [
        ("num_heads", 7),
        ("width", 264),
        ("backbone.num_heads", [3, 6, 12]),
        ("backbone.out_stages", [1, 2, 7]),
        ("backbone.out_stages", [3, 2, 1]),
        ("num_levels", 2),
    ],
}


@pytest.mark.parametrize(("message", "field", "value"), [(m, *case) for m, cases in WRONG.items() for case in cases])
def test_a_field_that_makes_no_model_is_named_in_one_line(message: str, field: str, value: Any) -> None:
    data = copy.deepcopy(json.loads(json.dumps(model_config_to_dict(MODEL_PRESETS["swin_t"]()))))
    *path, last = field.split(".")
    place = data
    for name in path:
        place = place[name]
    place[last] = value
    if value is None:
        del place[last]
    with pytest.raises(ValueError, match=message) as caught:
        model_config_from_dict(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", TRAIN_PRESETS)
def test_training_presets_are_within_their_ranges(name: str) -> None:
    check_train_config(TRAIN_PRESETS[name]())


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("data", {"batch_size": 0}),
        ("data", {"train_sides": ()}),
        ("data", {"crop_probability": 1.5}),
        ("optimizer", {"lr": float("nan")}),
        ("optimizer", {"betas": (0.9, 1.0)}),
        ("schedule", {"kind": "linear"}),
        ("", {"epochs": 0}),
        ("", {"ema_decay": 1.0}),
        ("", {"log_every": 0}),
        ("", {"precision": "fp8"}),
    ],
)
def test_a_training_field_out_of_its_range_is_named(part: str, change: dict[str, Any]) -> None:
    config = quickstart()
    changed = replace(getattr(config, part), **change) if part else None
    config = replace(config, **({part: changed} if part else change))
    (name,) = change
    with pytest.raises(ValueError, match=f"^{part + '.' if part else ''}{name}"):
        check_train_config(config)


@pytest.mark.parametrize("data", [None, [], 3, "swin_t", {}])
def test_what_is_no_config_at_all_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="not a model config"):
        model_config_from_dict(data)
    assert isinstance(MODEL_PRESETS["swin_b"](), ModelConfig)
