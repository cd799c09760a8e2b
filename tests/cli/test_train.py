"""The command line of train.py."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import REPOSITORY, environment, scenes

from groundingdino.cli.train import parse

SMALL = (
    "--model.text.num-layers 1 --model.text.width 32 --model.text.num-heads 2 --model.text.ffn-width 32 "
    "--model.backbone.embed-dim 16 --model.backbone.depths 1 1 1 1 --model.backbone.num-heads 1 2 4 8 "
    "--model.enhancer-layers 1 --model.decoder-layers 1"
)


def train(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python train.py ARGUMENTS` in the folder `cwd`."""
    command = [sys.executable, str(REPOSITORY / "train.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=180)


def test_no_argument_is_the_recipe_of_the_paper() -> None:
    preset, config = parse([])
    assert preset == "refcoco"
    assert config == parse(["refcoco"])[1]
    assert (config.model.name, config.data.batch_size, config.epochs) == ("swin_b", 2, 5)
    assert (config.optimizer.lr, config.optimizer.base_batch, config.optimizer.weight_decay) == (2e-4, 32, 1e-4)
    assert (config.optimizer.clip_norm, config.schedule.milestones, config.schedule.gamma) == (0.1, (3,), 0.1)
    assert config.data.train_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert config.model.backbone.drop_path_rate == 0.3 and config.model.fusion_dropout == 0.1
    assert [split for split, _ in config.data.evaluation] == [
        "val",
        "testA",
        "testB",
    ] and config.data.flip_probability == 0.0


def test_every_field_can_be_set_with_and_without_the_name_of_a_preset() -> None:
    changes = ["--optimizer.lr", "5e-5", "--data.root", "elsewhere", "--resume", "auto", "--freeze", "text_encoder"]
    for arguments in (changes, ["quickstart", *changes]):
        config = parse(arguments)[1]
        assert config.optimizer.lr == 5e-5 and config.data.root == Path("elsewhere")
        assert config.resume == "auto" and config.freeze == ("text_encoder",)
    sources = parse(["--data.train-files", "a.json", "b.json", "--data.sampling-weights", "1", "0.5"])[1].data
    assert sources.train_files == ("a.json", "b.json") and sources.sampling_weights == (1.0, 0.5)


def test_flags_of_the_first_version_still_work() -> None:
    old = "--run r --init=a.pth --accumulate 2 --data.train a.json --data.images i --data.weights 3".split()
    config = parse([*old, "--data.evaluation_images", "e"])[1]
    assert (config.run_dir, config.init_from, config.accumulation_steps) == (Path("r"), Path("a.pth"), 2)
    assert (config.data.train_files, config.data.image_dirs) == (("a.json",), ("i",))
    assert (config.data.sampling_weights, config.data.evaluation_image_dirs) == ((3.0,), ("e",))


def test_without_data_one_line_says_what_is_missing_where_and_how_to_get_it(tmp_path: Path) -> None:
    found = train(cwd=tmp_path)
    assert found.returncode == 2 and found.stdout == ""
    (line,) = found.stderr.splitlines()
    for part in ("refcoco/train2014", "finetune_refcoco_testB.json", str(tmp_path), "http", "quickstart"):
        assert part in line


def test_without_weights_one_line_says_where_they_are(tmp_path: Path) -> None:
    found = train("--data.root", str(scenes(tmp_path / "data")), cwd=tmp_path)
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert "weights/grounding_dino_swin-b_pretrain_obj365_goldg_v3de-f83eef00.pth" in line and "https://" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--data.sampling-weights", "1", "2"], "data.sampling_weights has 2 entries for 1 training files"),
        (["--optimizer.lr-multipliers", "nothing_like_it", "0.1"], "'nothing_like_it' is part of no parameter's name"),
        (["--ema-decay", "2"], "ema_decay: expected `float` < 1.0"),
    ],
)
def test_what_a_user_can_mend_is_one_line_without_a_traceback(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    data = ["--data.root", str(scenes(tmp_path / "data")), "--init-from", "None", "--data.workers", "0"]
    found = train(*data, *SMALL.split(), *arguments, cwd=tmp_path)
    assert found.returncode == 2
    assert message in found.stderr.splitlines()[-1] and "Traceback" not in found.stderr


def test_an_mmdet_checkpoint_is_converted_on_the_fly(golden: Path, tmp_path: Path) -> None:
    weights = tmp_path / "tiny.pth"
    weights.write_bytes((golden / "tiny/mmdet_checkpoint.pth").read_bytes())
    data = ["--data.root", str(scenes(tmp_path / "data")), "--data.workers", "0", "--data.evaluation"]
    sides = ["--data.train-sides", "64", "--data.crop-probability", "0", "--epochs", "1", "--run-dir", "run"]
    found = train(*data, *sides, "--init-from", str(weights), "--save-every", "4", cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-2000:]
    assert (tmp_path / "run/final.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir() if "tiny" in path.name] == ["tiny.pth"]  # converted into the cache
    assert "learning rate 1.25e-05 (0.0002 for 32 images)" in found.stdout


def test_presets_differ_only_where_they_say_so() -> None:
    fields = {f.name for f in dataclasses.fields(parse([])[1])}
    assert {"model", "data", "optimizer", "schedule", "run_dir"} <= fields


@pytest.mark.slow
def test_what_goes_wrong_in_any_of_several_processes_is_said_once(golden: Path, tmp_path: Path) -> None:
    data = scenes(tmp_path / "data")
    weights = tmp_path / "tiny.pth"
    weights.write_bytes((golden / "tiny/mmdet_checkpoint.pth").read_bytes())
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*launch, str(REPOSITORY / "train.py"), "--device", "cpu", "--data.workers", "0", "--data.root"]

    def errors(*arguments: str) -> list[str]:
        found = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=180
        )
        assert found.returncode != 0
        return [line for line in found.stderr.splitlines() if line.startswith("train.py: ")]

    (line,) = errors(str(tmp_path / "nowhere"))
    assert "data not found" in line
    broken = sorted((data / "train2014").glob("*.jpg"))[0]
    broken.write_bytes(broken.read_bytes()[:200])
    small = ["--data.train-sides", "64", "--data.crop-probability", "0", "--data.evaluation"]
    (line,) = errors(str(data), "--init-from", str(weights), *small)
    assert broken.name in line
