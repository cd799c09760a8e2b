"""A run with adapters: what it trains, what it saves, and that it can be interrupted."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import LAST_STEP, SMALL, assert_same_end, losses, small_config

import groundingdino as gd
from groundingdino.checkpoints import model_file
from groundingdino.config import TrainConfig
from groundingdino.model import build_detector, lora
from groundingdino.training.learner import Learner
from groundingdino.training.trainer import fit


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    model_file.save_detector(path, build_detector(SMALL))
    return path


def adapter_config(data: Path, run: Path, base: Path, **changes: object) -> TrainConfig:
    """Two epochs, recomputed, with a moving average."""
    changes = {"init_from": base, "lora": 4, "activation_checkpointing": True, **changes}
    return dataclasses.replace(small_config(data, run), **changes)  # type: ignore[arg-type]


def test_a_run_trains_adapters_alone_and_saves_them_beside_the_merged_model(
    data: Path, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "groundingdino")
    result = fit(adapter_config(data, tmp_path, base, freeze=("text_encoder",)))
    before, after = load_file(base), load_file(result.files["final"])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = ("backbone", "feature_enhancer", "decoder")
    assert moved == {name for name, _ in lora.matrices(build_detector(SMALL), parts)}
    loaded = gd.load_model(base, "cpu", adapter=result.files["final adapter"]).model.state_dict()
    assert all(torch.equal(loaded[name], after[name]) for name in after)
    small, whole = result.files["final adapter"].stat().st_size, result.files["final"].stat().st_size
    assert small < whole / 10
    assert "in adapters of rank 4; weights, gradients and optimizer take" in caplog.text


def test_a_run_that_is_interrupted_and_resumed_ends_bit_equal(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(adapter_config(data, tmp_path / "whole", base))
    steps, original = [0], Learner.step

    def interrupted(*arguments: object, **options: object) -> object:
        steps[0] += 1
        if steps[0] == 6:  # the last state is that after the third step
            raise KeyboardInterrupt
        return original(*arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Learner, "step", interrupted)
        fit(adapter_config(data, tmp_path / "run", base))
    resumed = adapter_config(data, tmp_path / "run", base, resume="auto")
    with pytest.raises(ValueError, match="cannot resume with lora 4 -> 2"):
        fit(dataclasses.replace(resumed, lora=2))
    fit(resumed)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_adapters_train_in_bf16_and_without_recomputing_to_about_the_same_losses(
    data: Path, base: Path, tmp_path: Path
) -> None:
    sources = dataclasses.replace(small_config(data, tmp_path).data, evaluation=())
    variants: dict[str, dict[str, object]] = {
        "recomputed": {},
        "kept": {"activation_checkpointing": False},
        "bf16": {"precision": "bf16"},
    }
    for name, changes in variants.items():
        config = adapter_config(data, tmp_path / name, base, epochs=1, **changes)
        fit(dataclasses.replace(config, data=sources))
    recomputed, kept, bf16 = (losses(tmp_path / name) for name in ("recomputed", "kept", "bf16"))
    assert len(recomputed) == LAST_STEP // 2
    for step, row in recomputed.items():
        assert kept[step]["loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert bf16[step]["loss"] == pytest.approx(row["loss"], rel=0.05)


def test_adapters_without_a_trained_model_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--lora adapts a trained model: name its weights with --init-from"):
        fit(small_config(data, tmp_path, lora=4))
