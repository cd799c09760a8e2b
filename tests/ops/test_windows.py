"""The windows of a map."""

import torch

from groundingdino.ops import map_windows


def test_the_shift_mask_separates_exactly_what_the_roll_brought_together():
    window, shift, size = 4, 2, 8
    labels = torch.roll(torch.arange(size), -shift)  # where each rolled row came from
    mask = map_windows(size, size, window, shift, torch.empty(0)).mask.view(2, 2, window, window, window, window)
    for i in range(2):
        rows = labels[i * window : (i + 1) * window]
        neighbours = (rows[:, None] - rows[None, :]).abs() < window
        assert torch.equal(mask[i, 0, :, 0, :, 0] == 0, neighbours)


def test_every_token_is_found_at_the_place_that_its_number_names():
    height, width = 5, 6
    for shift in (0, 2):
        windows = map_windows(height, width, 4, shift, torch.empty(0))
        tokens = torch.arange(height * width)
        assert torch.equal(windows.token.flatten()[windows.place], tokens)
        assert (windows.token == height * width).sum() == windows.token.numel() - len(tokens)


def test_the_operator_passes_opcheck():
    for size in ((5, 6), (4, 4), (1, 9)):
        torch.library.opcheck(torch.ops.groundingdino.window_map.default, (torch.randn(3), *size, 4, 2))
