"""`python -m groundingdino` is the console script `groundingdino`: see --help."""

import sys

from groundingdino.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
