"""Train MM-Grounding-DINO: see --help. The same as `groundingdino train`."""

import sys

from groundingdino.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "train.py"))
