"""Which checkpoint a command takes."""

import pytest

from groundingdino.cli import loading


def test_the_only_checkpoint_near_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "one.safetensors").write_bytes(b"")
    assert loading.find_checkpoint(None).name == "one.safetensors"
    (tmp_path / "two.safetensors").write_bytes(b"")
    assert loading.find_checkpoint(tmp_path / "two.safetensors") == tmp_path / "two.safetensors"
    with pytest.raises(ValueError, match="two.safetensors, weights/one.safetensors"):
        loading.find_checkpoint(None)
