"""Train MM-Grounding-DINO: see --help."""

import sys

from groundingdino.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
