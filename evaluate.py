"""Evaluate a checkpoint: see --help."""

import sys

from groundingdino.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
