"""The source distribution and the wheel: what is in them, and that a wheel alone does everything in an empty folder."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from golden_cases import tiny_model
from training_runs import scenes

import groundingdino
from groundingdino.checkpoints.model_file import save_detector

ROOT = Path(__file__).parents[1]
SMALL = (
    "--init-from None --data.workers 0 --data.train-sides 64 --data.crop-probability 0 --data.evaluation --epochs 1 "
    "--device cpu --model.text.num-layers 1 --model.text.width 32 --model.text.num-heads 2 --model.text.ffn-width 32 "
    "--model.backbone.embed-dim 16 --model.backbone.depths 1 1 1 1 --model.backbone.num-heads 1 2 4 8 "
    "--model.enhancer-layers 1 --model.decoder-layers 1 --pictures 0"
)
pytestmark = pytest.mark.slow


def tracked(folder: Path) -> Path:
    """A copy of the files under version control, or of all but build products where there is none."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.splitlines()
    if listed.returncode:
        files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file() and path.suffix != ".so")
        names = [str(path) for path in files if path.parts[0][:1] != "." and "egg-info" not in str(path)]
    for name in names:
        if (ROOT / name).is_file() and not name.startswith(("docs/", "tests/golden/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def build(kind: str, source: Path, out: Path) -> Path:
    """What pip does to build, without the network."""
    code = f"import setuptools.build_meta as backend, sys; backend.build_{kind}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tracked(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, which thereby has all that it needs."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel, which borrows this one's dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    target = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (target / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    tops = {name.split("/")[0] for name in names}
    assert tops == {"groundingdino", f"groundingdino-{groundingdino.__version__}.dist-info"}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "groundingdino").rglob("*.py")}
    folders = (ROOT / "groundingdino/inputs/assets", ROOT / "groundingdino/inference/vocabularies")
    assets = {str(path.relative_to(ROOT)) for folder in folders for path in folder.iterdir()}
    package = {name for name in names if name.startswith("groundingdino/")}
    kernels = {name for name in package if name.startswith("groundingdino/ops/_cpu_kernels.") and name.endswith(".so")}
    assert package - kernels == expected | assets | {"groundingdino/py.typed", "groundingdino/cli/review.html"}
    assert len(kernels) == 1
    assert f"Version: {groundingdino.__version__}\n" in metadata and "License-Expression: Apache-2.0\n" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert not [
        line for line in required if any(name in line for name in ("scipy", "matplotlib", "tensorboard", "gradio"))
    ]


def test_the_source_distribution_holds_no_tests_data_or_build_products(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert "groundingdino/ops/csrc/cpu/linear.inc" in names and "LICENSE" in names and "NOTICE" in names
    assert not [name for name in names if name.startswith("benchmarks") or name.endswith((".so", ".png", ".jpg"))]


def test_a_wheel_in_an_empty_folder_does_everything(installed: Path, golden: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "tiny.safetensors"
    save_detector(checkpoint, tiny_model())
    data = scenes(tmp_path / "scenes")
    folder = tmp_path / "empty"
    folder.mkdir()
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments: object, program: tuple[str, ...] = ("groundingdino",)) -> str:
        command = [str(installed / program[0]), *program[1:], *map(str, arguments)]
        done = subprocess.run(
            command, cwd=folder, env=variables | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    where = run("-c", "import groundingdino; print(groundingdino.__file__)", program=("python",))
    assert Path(where).is_relative_to(installed.parent)
    assert run("--version") == run("--version", program=("python", "-m", "groundingdino"))
    assert "predict" in run("--help") and "--data.root" in run("train", "refcoco", "--help")
    assert "our CPU kernel" in run("selfcheck", "--device", "cpu", "--repeats", 0)
    photo = golden / "photos" / "train2014" / "COCO_train2014_000000000001.jpg"
    asked = ["--categories", "helmet, flag", "--threshold", 0.01, "--scale", 96, 160, "--save", "out.jpg"]
    answer = json.loads(run("predict", photo, "--checkpoint", checkpoint, *asked))
    assert answer["detections"] and (folder / "out.jpg").is_file()
    run("convert", golden / "tiny" / "mmdet_checkpoint.pth", "converted.safetensors")
    assert json.loads(run("info", "converted.safetensors", "--json"))["parameters"] > 0
    mdetr = golden / "data" / "mdetr_annotations" / "finetune_refcoco_train.json"
    assert "41 entries" in run("data", "convert", mdetr, "vg.json", "--to", "odvg")
    run("train", "--data.root", data, "--run-dir", "run", *SMALL.split())
    trained = ["--checkpoint", "run/final.safetensors", "--data-root", data, "--split", "val", "--workers", 0]
    assert "P@1" in run("evaluate", *trained, "--scale", 64, 96, "--device", "cpu")
