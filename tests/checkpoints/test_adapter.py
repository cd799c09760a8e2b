"""Adapter files: small, met only by the model they were trained on, merged and added up."""

import json

import pytest
import torch
from golden_cases import tiny_model

import groundingdino as gd
from groundingdino.checkpoints import adapter
from groundingdino.checkpoints.model_file import SOURCE_KEY, load_detector, read_metadata, save_detector
from groundingdino.checkpoints.safetensors_file import TensorFile, write_tensors
from groundingdino.cli.merge import main as merge_command
from groundingdino.model import lora


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The base, two adapters, and the models that they were saved from."""
    folder = tmp_path_factory.mktemp("adapters")
    save_detector(folder / "base.safetensors", tiny_model())
    models = {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = tiny_model()
        lora.add_adapters(model, 2, ["decoder", "feature_enhancer"])
        with torch.no_grad():
            for key, tensor in model.named_parameters():
                if key.endswith(".0.b"):
                    tensor.normal_(std=0.05)
        origin = adapter.AdapterOrigin(2, ("decoder",), adapter.identity(lora.base_state(model.state_dict())), "tiny")
        adapter.save_adapter(folder / f"{name}.safetensors", model, origin, {"note": "kept"})
        models[name] = lora.merged_state(model)
    return folder, models


def test_a_model_with_its_adapter_is_the_one_that_was_trained(files):
    folder, models = files
    base, one = folder / "base.safetensors", folder / "one.safetensors"
    assert one.stat().st_size < base.stat().st_size / 5
    found = gd.load_model(base, "cpu", adapter=one).model.state_dict()
    assert found.keys() == models["one"].keys()
    assert all(torch.equal(found[name], models["one"][name]) for name in found)
    with TensorFile(one) as file:
        assert file.metadata["note"] == "kept" and json.loads(file.metadata[adapter.ADAPTER_KEY])["rank"] == 2


def test_what_is_kept_beside_an_adapter_does_not_replace_how_it_was_made(tmp_path):
    model = tiny_model()
    lora.add_adapters(model, 2, ["decoder"])
    origin = adapter.AdapterOrigin(2, ("decoder",), adapter.identity(lora.base_state(model.state_dict())), "tiny")
    of_another = {adapter.ADAPTER_KEY: json.dumps({"rank": 8}), "note": "kept"}
    adapter.save_adapter(tmp_path / "a.safetensors", model, origin, of_another)
    assert adapter.read_adapter(tmp_path / "a.safetensors")[0] == origin


def test_several_adapters_add_up(files):
    folder, models = files
    base = tiny_model().state_dict()
    both = gd.load_model(
        folder / "base.safetensors", "cpu", adapter=[folder / "one.safetensors", folder / "two.safetensors"]
    )
    for name, found in both.model.state_dict().items():
        torch.testing.assert_close(found, models["one"][name] + models["two"][name] - base[name], atol=1e-6, rtol=0)


def test_the_command_merges_an_adapter_in_full_or_in_part(files, tmp_path, capsys):
    folder, models = files
    target, base = tmp_path / "merged.safetensors", tiny_model().state_dict()
    names = [str(folder / "base.safetensors"), str(folder / "one.safetensors"), str(target)]
    assert merge_command(names) == 0 and "1 x adapter" in capsys.readouterr().out
    merged = load_detector(target).state_dict()
    assert all(torch.equal(merged[name], models["one"][name]) for name in merged)
    assert json.loads(read_metadata(target)[SOURCE_KEY])["merged"][1] == {"adapter": "one.safetensors", "weight": 1.0}
    assert merge_command([*names, "--alpha", "0.5"]) == 0
    for name, half in load_detector(target).state_dict().items():
        torch.testing.assert_close(half, (base[name] + models["one"][name]) / 2, atol=1e-6, rtol=0)


def test_an_adapter_of_another_model_a_damaged_one_and_one_in_place_of_a_model_are_refused(files, tmp_path):
    folder, models = files
    one = folder / "one.safetensors"
    other = tiny_model()
    with torch.no_grad():
        other.level_embedding[0, 0] += 1e-3
    save_detector(tmp_path / "other.safetensors", other)
    with pytest.raises(ValueError, match="one.safetensors: an adapter of another model: trained on tiny with weights"):
        gd.load_model(tmp_path / "other.safetensors", "cpu", adapter=one)
    with pytest.raises(ValueError, match="base.safetensors: not an adapter"):
        gd.load_model(folder / "base.safetensors", "cpu", adapter=folder / "base.safetensors")
    with pytest.raises(ValueError, match="an adapter, not a model; merge it first: groundingdino merge BASE"):
        gd.load_model(one, "cpu")
    with TensorFile(one) as file:
        tensors, metadata = {name: file.read(name) for name in file.entries}, file.metadata
    first = next(name for name in tensors if name.endswith(".a"))
    damage = {
        "no partner": {name: t for name, t in tensors.items() if name != first},
        r"\(1, 3, 5\) and": {**tensors, first: torch.zeros(1, 3, 5)},
        "not finite": {**tensors, first: tensors[first] * torch.nan},
    }
    for message, content in damage.items():
        write_tensors(tmp_path / "damaged.safetensors", content, metadata)
        with pytest.raises(ValueError, match=message):
            gd.load_model(folder / "base.safetensors", "cpu", adapter=tmp_path / "damaged.safetensors")
