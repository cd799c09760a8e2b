"""What a training image goes through."""

import numpy as np
import torch

from groundingdino.data import Augmentation
from groundingdino.data.augmentation import augment


def test_a_vertical_flip_turns_pixels_and_boxes_upside_down() -> None:
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 4:10, 20:30] = 255
    plain = Augmentation((40,), 100, crop_probability=0.0)
    flipped = Augmentation((40,), 100, crop_probability=0.0, vertical_flip_probability=1.0)
    box = torch.tensor([[20.0, 4.0, 30.0, 10.0]])
    views = [augment(image, box, config, np.random.default_rng(0)) for config in (plain, flipped)]
    assert torch.equal(views[0].image, image) and torch.equal(views[1].image, image.flip(1))
    assert views[1].boxes.tolist() == [[20.0, 30.0, 30.0, 36.0]] and not views[1].flipped
