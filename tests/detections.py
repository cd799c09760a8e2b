"""Detections that the adapters' tests convert."""

import torch

from groundingdino.structures import Detections

SIZE = (40, 50)  # width, height of their image
FOUND = Detections(
    boxes=torch.tensor([[1.0, 2.0, 11.0, 22.0], [0.5, 0.25, 4.0, 8.0]]),
    scores=torch.tensor([0.75, 0.5]),
    labels=torch.tensor([1, 0]),
    names=("dog", "cat"),
)
NOTHING = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), ())
