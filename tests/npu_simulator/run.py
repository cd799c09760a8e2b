"""Runs a script of this repository on the simulated NPU: python tests/npu_simulator/run.py train.py quickstart ..."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from npu_simulator import simulator

    simulator.install()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
