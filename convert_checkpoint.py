"""Convert MM-Grounding-DINO weights between formats: see --help."""

import tyro

from groundingdino.cli.convert import main

if __name__ == "__main__":
    tyro.cli(main)
