"""MM-Grounding-DINO in plain PyTorch."""

from groundingdino import environment as environment  # first: it settles variables that `import torch` reads
