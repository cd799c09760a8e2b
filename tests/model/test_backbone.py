"""Windows of the Swin backbone. Its values are compared with mmdet's in `test_detector.py`."""

import torch

from groundingdino.model.backbone import map_windows


def test_the_shift_mask_separates_exactly_what_the_roll_brought_together():
    window, shift, size = 4, 2, 8
    labels = torch.roll(torch.arange(size), -shift)  # where each rolled row came from
    mask = map_windows(size, size, window, shift, torch.empty(0)).mask.view(2, 2, window, window, window, window)
    for i in range(2):
        rows = labels[i * window : (i + 1) * window]
        neighbours = (rows[:, None] - rows[None, :]).abs() < window
        assert torch.equal(mask[i, 0, :, 0, :, 0] == 0, neighbours)
