"""Time and peak memory of loading a checkpoint of ours, in a fresh process.

python -m benchmarks load [--path MODEL.safetensors] [--size swin_b]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

from benchmarks import workload
from benchmarks.race import ROOT, Size, row

SECONDS, TIMES_ITS_SIZE = 3.0, 1.2
SCRIPT = """
import sys, time
from pathlib import Path
from benchmarks.worker import peak_mib, reset_peak
from groundingdino.checkpoints.model_file import load_detector
from groundingdino.model import build_detector  # timm's import is not part of what is measured
reset_peak()
before, started = peak_mib(), time.perf_counter()
model = load_detector(sys.argv[1])
print(time.perf_counter() - started, peak_mib() - before, sum(p.numel() for p in model.parameters()))
"""


def measure(path: Path) -> tuple[float, float, int]:
    """Seconds, MiB that were added, parameters."""
    command = [sys.executable, "-c", SCRIPT, str(path)]
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
    seconds, added, parameters = output.split()
    return float(seconds), float(added), int(parameters)


def main(path: Path | None = None, size: Size = "swin_b") -> None:
    """Load it and print seconds, and memory as a multiple of the file's size.

    Args:
        path: a checkpoint of ours; default is a random one.
        size: of the random one.
    """
    with tempfile.TemporaryDirectory() as name:
        if path is None:
            path = Path(name) / "ours.safetensors"
            workload.write_models(Path(name), size, with_transformers=False)
        seconds, added, parameters = measure(path.resolve())
        mib = path.stat().st_size / 2**20
    print(f"\n{parameters:,} parameters, a file of {mib:,.0f} MiB\n\n| | measured | target | |\n|---|---|---|---|")
    print(row("load_detector", f"{seconds:.2f} s", f"{SECONDS:.0f} s", seconds < SECONDS))
    times = added / mib
    print(row("memory added, of the file's size", f"{times:.2f}", f"{TIMES_ITS_SIZE}", times <= TIMES_ITS_SIZE))


if __name__ == "__main__":
    tyro.cli(main)
