"""Seconds of `import groundingdino` beyond `import torch`, each time in a fresh process.

python -m benchmarks imports [--rounds 5]
"""

import json
import statistics
import subprocess
import sys

import tyro

from benchmarks.race import ROOT, row

TARGET = 0.3
STATEMENTS = ("import groundingdino", "from groundingdino import load_model, build_detector")
SCRIPT = """
import json, sys, time
times = []
for statement in json.loads(sys.argv[1]):
    begin = time.perf_counter()
    exec(statement)
    times.append(time.perf_counter() - begin)
print(json.dumps(times))
"""


def main(rounds: int = 5) -> None:
    """Print a table of medians.

    Args:
        rounds: fresh processes, after one that fills the caches.
    """
    statements = json.dumps(["import torch", *STATEMENTS])
    found = []
    for _ in range(rounds + 1):
        command = [sys.executable, "-c", SCRIPT, statements]
        found.append(json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout))
    torch, package, names = (statistics.median(column) for column in zip(*found[1:], strict=True))
    print("\n| import | measured | target | |\n|---|---|---|---|")
    print(row("torch", f"{torch:.2f} s"))
    print(row(f"{STATEMENTS[0]}, after torch", f"{package:.3f} s", f"{TARGET} s", package < TARGET))
    print(row(f"{STATEMENTS[1]}, after that", f"{names:.2f} s"))


if __name__ == "__main__":
    tyro.cli(main)
