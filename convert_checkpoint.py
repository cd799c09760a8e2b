"""Convert MM-Grounding-DINO weights between formats: see --help. The same as `groundingdino convert`."""

import sys

from groundingdino.cli.convert import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "convert_checkpoint.py"))
