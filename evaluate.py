"""Evaluate a checkpoint: see --help. The same as `groundingdino evaluate`."""

import sys

from groundingdino.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "evaluate.py"))
