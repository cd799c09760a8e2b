"""The order of the rooms: a module imports only from its own rung or from those below it."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "groundingdino"

# Top rung first. A folder's name stands for everything in it; a module that is not listed belongs to no rung and fails.
LADDER = (
    ("__main__", "cli", "integrations", "util", "models", "datasets"),
    ("training",),
    ("evaluation",),
    ("inference",),
    ("data", "checkpoints"),
    ("model", "inputs"),
    ("ops", "runtime", "config", "structures", "boxes"),
)
RUNG = {name: len(LADDER) - level for level, names in enumerate(LADDER) for name in names}

# Each of these enters by one door.
DOORS = {
    "timm": {"model/backbone.py"},
    "tokenizers": {"inputs/text.py", "inference/onnx_example.py"},  # the latter is a program of its own
    "onnx": {"inference/atc.py", "inference/export.py", "inference/export_check.py"},
    "onnxruntime": {"inference/export_check.py", "inference/onnx_example.py"},
    "torch_npu": {"training/profiling.py"},  # elsewhere torch.get_device_module("npu") is it
    "triton": {"ops/ms_deform_attn/triton_kernels.py"},
    "transformers": {"integrations/sam.py"},
    "scipy": {"training/matcher.py"},
    "pycocotools": {"evaluation/coco.py", "integrations/sam.py"},
    "gradio": {"cli/demo_page.py"},
    "yaml": {"data/formats/files.py"},
    "supervision": {"integrations/supervision.py", "util/inference.py"},
    "fastapi": {"integrations/server.py", "integrations/server_limits.py"},
    "fastapi_offline": {"integrations/server.py"},
    "starlette": {"integrations/server.py"},  # the base of FastAPI's errors
    "pydantic": {"integrations/server.py"},
    "prometheus_client": {"integrations/server.py", "integrations/server_limits.py"},
    "uvicorn": {"cli/serve.py"},
    "fiftyone": {"integrations/fiftyone.py"},
    "cvat_sdk": {"integrations/cvat.py"},
    "sahi": {"integrations/sahi.py"},
    "label_studio_ml": {"integrations/label_studio_backend.py"},
    "av": {"inference/image_source.py"},
    "ray": {"cli/label_ray.py"},
    "pyarrow": {"cli/label_ray.py"},
    "fsspec": {"inference/remote.py"},
    "huggingface_hub": {"checkpoints/hub.py", "checkpoints/push.py"},
    "nltk": {"inputs/noun_phrases.py"},
    "matplotlib": {"data/data_counts.py", "evaluation/report.py", "training/recorder.py"},
    "tensorboard": {"training/loggers.py"},
    "wandb": {"training/loggers.py"},
    "mlflow": {"training/loggers.py"},
    "torchvision": {"inference/postprocess.py", "training/criterion.py", "datasets/transforms.py"},
}
# Not behind a door: what tensors, images and records are made of, and what every command uses.
EVERYWHERE = {"torch", "numpy", "PIL", "msgspec", "tqdm", "tyro"}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of everything a module imports, inside functions too, type checking aside."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    skipped = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_room_imports_only_from_its_own_rung_or_below():
    wrong = []
    for path in modules():
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "groundingdino" and len(parts) > 1 and parts[1] in RUNG:
                if RUNG[parts[1]] > RUNG[room(path)]:
                    wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, wrong


def test_every_room_has_a_place_on_the_ladder():
    assert {room(path) for path in modules()} <= RUNG.keys()


def test_data_and_model_meet_only_through_structures():
    names = {name for path in modules() if room(path) == "data" for name in imported(path)}
    assert not {name for name in names if name.startswith("groundingdino.model")}


def test_every_third_party_package_has_its_door():
    packages = {name.split(".")[0] for path in modules() for name in imported(path)}
    assert packages - sys.stdlib_module_names - {"groundingdino"} <= DOORS.keys() | EVERYWHERE


def test_a_third_party_package_enters_by_one_door():
    for package, doors in DOORS.items():
        users = {str(p.relative_to(PACKAGE)) for p in modules() for n in imported(p) if n.split(".")[0] == package}
        assert users <= doors, f"{package} is imported by {users - doors}"


def test_importing_the_package_imports_nothing_slow():
    code = "import sys, groundingdino; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert loaded.isdisjoint(
        {"timm", "transformers", "torch_npu", "scipy", "nltk", "gradio", "matplotlib", "torchvision"}
    )
