"""MM-Grounding-DINO in plain PyTorch."""
