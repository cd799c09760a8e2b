"""Stochastic depth: who takes which residual branch, and what that changes."""

import pytest
import torch

from groundingdino.config import BackboneConfig
from groundingdino.model import backbone as backbone_module
from groundingdino.model.backbone import SwinBackbone
from groundingdino.model.stochastic_depth import DropPath, sample_drop_path
from groundingdino.ops import map_windows

CPU = torch.device("cpu")


def small_backbone(drop_path_rate: float) -> SwinBackbone:
    torch.manual_seed(0)
    return SwinBackbone(BackboneConfig(8, (1, 2, 1, 1), (1, 2, 2, 2), 4, drop_path_rate=drop_path_rate)).train()


def test_stochastic_depth_skips_later_blocks_more_often_and_none_outside_training():
    backbone = small_backbone(0.5)
    images = 4000
    branches = sample_drop_path(backbone.drop_path_probabilities(), images, CPU)
    assert len(branches) == 2 * 5
    for number, branch in enumerate(branches):
        probability = 1 - 0.5 * (number // 2) / 4
        assert branch.count / images == pytest.approx(probability, abs=0.03)
        assert branch.weight == pytest.approx(1 / probability)
        assert (branch.index is None) == (branch.count == images)
    everyone = sample_drop_path(backbone.eval().drop_path_probabilities(), 3, CPU)
    assert all(branch == DropPath(3, None, 1.0) for branch in everyone)


def test_an_image_that_skips_a_branch_is_computed_as_if_the_branch_were_not_there(monkeypatch):
    """Together in a batch, where the others take the branch, and alone, where nothing of it is computed."""
    backbone = small_backbone(0.9)
    pixels = torch.randn(3, 3, 36, 44)
    drawn = sample_drop_path(backbone.drop_path_probabilities(), 3, CPU)
    counts = {branch.count for branch in drawn}
    assert counts >= {0, 1, 3}, "the draw should show every case"

    def alone(image: int) -> list[DropPath]:
        return [DropPath(int(b.index is None or image in b.index), None, b.weight) for b in drawn]

    monkeypatch.setattr(backbone_module, "sample_drop_path", lambda *_: drawn)
    together = backbone(pixels)
    for image in range(3):
        monkeypatch.setattr(backbone_module, "sample_drop_path", lambda *_, image=image: alone(image))
        for whole, part in zip(together, backbone(pixels[image : image + 1]), strict=True):
            torch.testing.assert_close(whole[image : image + 1], part, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_skipped_branch_changes_nothing_and_gives_gradients_of_zero_not_none(recompute):
    backbone = small_backbone(0.0)
    stage = backbone.stages[0]
    x = torch.randn(2, 5, 6, 8, requires_grad=True)
    nobody = DropPath(0, torch.empty(0, dtype=torch.int64), 2.0)
    out = stage(x, [(nobody, nobody)], recompute)
    assert torch.equal(out, x)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    grads = [parameter.grad for parameter in stage.blocks.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_a_taken_branch_weighs_as_much_as_makes_up_for_the_skipped_ones():
    block = small_backbone(0.0).stages[0].blocks[0]
    x, windows = torch.randn(2, 5, 6, 8), map_windows(5, 6, 4, 0, torch.empty(0))
    everyone = DropPath(2, None, 2.0)
    out = block(x, windows, (everyone, everyone), recompute=False)
    middle = x + 2 * block.attn(block.norm1(x), windows)
    torch.testing.assert_close(out, middle + 2 * block.mlp(block.norm2(middle)))
