"""Collect what a bug report or a result from a card needs, in one archive without private data.

    groundingdino report                                 this machine: versions, self check, environment
    groundingdino report --run-dir runs/refcoco          and a training run's settings, figures and trace tables

Nothing is sent. Paths below the home and working folders, user and host names and addresses are replaced; no image, no
caption and no weight goes in. Look into the archive before you hand it on.
"""

import contextlib
import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from groundingdino.cli import console

RUN_FILES = ("config.json", "environment.json", "metrics.jsonl", "nonfinite.jsonl", "curves.png")
TABLES = ("op_statistic.csv", "step_trace_time.csv")  # of torch_npu's profiler


@dataclass(frozen=True)
class Arguments:
    """What to collect."""

    out: Path = Path("groundingdino-report.zip")
    """the archive to write"""
    run_dir: Path | None = None
    """folder of a training run whose settings and figures belong to the report"""
    device: str = "auto"
    """auto, cpu, cuda, npu, ..."""
    repeats: int = 5
    """timed calls of the self check; 0 leaves the timing out"""


def collect(arguments: Arguments) -> int:
    """Write the archive. The exit code of the self check in it."""
    import json

    from groundingdino.cli.operator_report import print_report, ready_device
    from groundingdino.runtime import environment, files, tuning

    if arguments.run_dir is not None and not arguments.run_dir.is_dir():
        raise ValueError(f"no run folder {arguments.run_dir}: name the --run-dir of a training run")
    device = ready_device(arguments.device)
    checked = io.StringIO()
    with contextlib.redirect_stdout(checked):
        code = print_report(device, arguments.repeats)
    content = {"selfcheck.txt": checked.getvalue().encode()}
    content["environment.json"] = json.dumps(environment.describe(), indent=1).encode()
    table = tuning.table_path(device)
    if table.is_file():
        content["tuning.json"] = table.read_bytes()
    if arguments.run_dir is not None:
        content |= {f"run/{name}": data for name, data in _of_run(arguments.run_dir)}
    hide = environment.private_words()
    with files.atomic_file(arguments.out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            cleaned = data if name.endswith(".png") else environment.without(hide, data.decode(errors="replace"))
            archive.writestr(name, cleaned)
    print(f"wrote {arguments.out}: {', '.join(content)}")
    return code


def _of_run(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in [folder / name for name in RUN_FILES]:
        if path.is_file():
            yield path.name, path.read_bytes()
    for name in TABLES:
        for path in sorted((folder / "profile").rglob(name)):
            yield f"profile/{name}", path.read_bytes()


def main(arguments: Sequence[str], prog: str = "groundingdino report") -> int:
    """The exit code."""
    return console.run(prog, lambda: collect(console.parse(Arguments, arguments, prog, description=__doc__)))
