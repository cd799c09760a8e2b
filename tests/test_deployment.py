"""The files of docker/, looked at and run dry: there is no container here, so `pip` and `apt-get` only write down."""

import json
import os
import re
import shlex
import subprocess
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from groundingdino.cli import console, serve, train
from groundingdino.cli import main as command_line

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
if not DOCKER.exists():
    pytest.skip("docker/ is in the repository only", allow_module_level=True)
FILES = sorted(DOCKER.glob("Dockerfile.*"))
INSTRUCTIONS = {"FROM", "RUN", "COPY", "WORKDIR", "ENV", "ARG", "SHELL", "HEALTHCHECK", "EXPOSE", "ENTRYPOINT", "CMD"}


def instructions(path: Path) -> list[tuple[str, str]]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


def dry_run(script: str, folder: Path, **variables: str) -> list[list[str]]:
    """What a shell script would have called of pip, apt-get, rm, ls, python, srun and scontrol."""
    folder.mkdir(exist_ok=True)
    log = folder / "calls"
    log.touch()
    for name in ("pip", "apt-get", "rm", "ls", "python", "srun", "scontrol"):
        says = "echo first" if name == "scontrol" else ":"
        (folder / name).write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$@" >> {log}\nprintf "\\n" >> {log}\n{says}\n')
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", **variables}
    subprocess.run(["bash", "-eu", "-c", script], check=True, env=env, cwd=ROOT)
    return [line.rstrip("\0").split("\0") for line in log.read_text().splitlines()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_dockerfile_is_pinned_copies_what_exists_and_has_a_health_check(path):
    found = instructions(path)
    assert {name for name, _ in found} <= INSTRUCTIONS
    (image,) = (value.split()[-1] for name, value in found if name == "FROM")
    assert re.search(r":\d+\.\d+\.\d+-", image), "not pinned to a version"
    for name, value in found:
        if name == "COPY":
            assert all((ROOT / source).exists() for source in value.split()[:-1])
        if name in ("ENTRYPOINT", "CMD", "SHELL"):
            assert all(isinstance(word, str) for word in json.loads(value))
    head = path.read_text().splitlines()[:2]
    tag = path.suffix[1:]
    assert head[0] == f"# docker build -f docker/{path.name} -t groundingdino:{tag} ."
    assert re.fullmatch(rf"# docker run --rm .*groundingdino:{tag} selfcheck", head[1])
    assert [name for name, _ in found].count("HEALTHCHECK") == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_a_dockerfile_runs_installs_pinned_wheels_and_known_extras(path, tmp_path):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    calls = [call for name, script in instructions(path) if name == "RUN" for call in dry_run(script, tmp_path)]
    installs = [call for call in calls if call[:2] == ["pip", "install"]]
    words = [word for call in installs for word in call[2:] if not word.startswith("-")]
    assert {"torch==2.9.0", "torchvision==0.24.0"} <= set(words)
    (own,) = (word for word in words if word.startswith("."))
    assert set(re.fullmatch(r"\.\[(.*)\]", own)[1].split(",")) <= known.keys()
    index = next(call[call.index("--index-url") + 1] for call in installs if "torch==2.9.0" in call)
    kind = path.suffix[1:]
    assert index.endswith("cu128" if kind == "cuda" else "cpu")
    assert ("torch_npu==2.9.0" in words) == (kind == "ascend") and known["npu"] == ["torch_npu==2.9.0"]
    assert "g++" in next(call for call in calls if call[:2] == ["apt-get", "install"])


def test_the_health_check_of_the_cpu_image_passes(capsys):
    (check,) = (value for name, value in instructions(DOCKER / "Dockerfile.cpu") if name == "HEALTHCHECK")
    command = json.loads(check[check.index("CMD") + 3 :])
    assert command[0] == "groundingdino" and command_line.main(command[1:]) == 0
    assert "WRONG" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_an_image_serves_at_the_port_that_it_exposes(kind):
    path = DOCKER / f"Dockerfile.{kind}"
    words = shlex.split(path.read_text().splitlines()[2])
    place = words.index(f"groundingdino:{kind}")
    own, flags = words[:place], words[place + 1 :]
    assert flags[0] == "serve" and own[own.index("-p") + 1] == "8000:8000"
    asked = console.parse(serve.Arguments, flags[1:], "groundingdino serve")
    assert asked.host == "0.0.0.0" and str(asked.checkpoint).startswith(own[own.index("-v") + 1].split(":")[1])
    found = instructions(path)
    assert ("EXPOSE", str(asked.port)) in found and ("ENTRYPOINT", '["groundingdino"]') in found
    assert any("serve" in re.findall(r"[a-z]+", value.split(".[")[-1]) for name, value in found if name == "RUN")


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_command_of_the_serving_page_asks_the_server(status):
    page = (ROOT / "docs/serving.md").read_text()
    command = shlex.split(re.search(r"--health-cmd ('[^']*')", page)[1])[0]

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run(command.replace("8000", str(server.server_port)), shell=True, capture_output=True)
        server.shutdown()
    assert (done.returncode == 0) == (status == 200)


def training_flags(command: list[str]) -> list[str]:
    assert command[command.index("-m") : command.index("-m") + 3] == ["-m", "groundingdino", "train"]
    return command[command.index("train") + 1 :]


def test_the_slurm_script_starts_the_training_that_resumes(tmp_path):
    script = (DOCKER / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, flags=re.MULTILINE))
    assert options["nodes"] == "2" and options["signal"] == "USR1@300" and "requeue" in options
    script = script.replace("source /usr/local/Ascend/ascend-toolkit/set_env.sh", ":")
    job = {"SLURM_JOB_NODELIST": "a[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "DATA": "my data"}
    command = dry_run(script, tmp_path, **job)[-1]
    assert command[:2] == ["srun", "torchrun"] and "--rdzv_endpoint=first:29500" in command
    _, config = train.parse(training_flags(command))
    assert config.resume == "auto" and config.precision == "bf16" and config.data.root == Path("my data")


def test_the_volcano_job_asks_for_eight_cards_and_starts_the_training_that_resumes():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((DOCKER / "volcano.yaml").read_text())
    assert (job["apiVersion"], job["kind"], job["spec"]["schedulerName"]) == (
        "batch.volcano.sh/v1alpha1",
        "Job",
        "volcano",
    )
    (task,) = job["spec"]["tasks"]
    pod = task["template"]["spec"]
    (container,) = pod["containers"]
    asked = container["resources"]
    assert asked["requests"] == asked["limits"] and asked["limits"]["huawei.com/Ascend910"] == 8
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    command = shlex.split(container["args"][0].split("&&")[1])
    assert command[:2] == ["exec", "torchrun"] and "--nproc_per_node=8" in command
    _, config = train.parse(training_flags(command))
    assert config.resume == "auto" and config.run_dir.is_relative_to("/data")


def test_the_device_options_are_those_of_the_cards_that_exist():
    found = subprocess.run([DOCKER / "ascend-devices"], capture_output=True, text=True, check=True).stdout.split()
    assert found[:4] == ["--network", "host", "--shm-size", "64g"]
    assert all(Path(found[i + 1]).exists() for i, word in enumerate(found) if word == "--device")
