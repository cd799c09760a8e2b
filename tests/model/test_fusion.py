"""The fusion's order of matmuls computes what the textbook's does."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from groundingdino.model.fusion import SCORE_LIMIT, Fusion


def textbook_fusion(fusion: Fusion, image: Tensor, text: Tensor, image_valid: Tensor, text_valid: Tensor):
    """The form that papers write: project everything into the fusion width, attend both ways, project back."""
    image, text = fusion.image_norm(image), fusion.text_norm(text)

    def by(projection: torch.nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, projection.weight, projection.bias)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (fusion.num_heads, -1)).transpose(1, 2)

    query, key = heads(by(fusion.image_query, image)), heads(fusion.text_key(text))
    scores = (query @ key.mT * query.shape[-1] ** -0.5).clamp(-SCORE_LIMIT, SCORE_LIMIT)
    to_image = scores.mT.masked_fill(~image_valid[:, None, None], float("-inf")).softmax(-1)
    to_text = scores.masked_fill(~text_valid[:, None, None], float("-inf")).softmax(-1)
    image_delta = by(fusion.image_out, (to_text @ heads(fusion.text_value(text))).transpose(1, 2).flatten(2))
    text_delta = fusion.text_out((to_image @ heads(by(fusion.image_value, image))).transpose(1, 2).flatten(2))
    return image + image_delta * fusion.image_scale, text + text_delta * fusion.text_scale


@pytest.mark.parametrize("loudness", [1.0, 3e3])  # the second drives scores far beyond the clamp at 50000
def test_fusion_equals_its_textbook_form_with_its_gradients(loudness):
    torch.manual_seed(0)
    fusion = Fusion(16, 32, 4, dropout=0.0).double()
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        fusion.image_query.weight *= loudness
        fusion.text_key.weight *= loudness
    image = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    text = torch.randn(2, 4, 16, dtype=torch.float64, requires_grad=True)
    image_valid, text_valid = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    image_valid[0, 6:], text_valid[1, 2:] = False, False
    inputs = (image, text, *fusion.parameters())
    ours, theirs = (
        fusion(image, text, image_valid, text_valid),
        textbook_fusion(*(fusion, image, text), image_valid, text_valid),
    )
    gradients = [torch.autograd.grad(sum((x * x).sum() for x in out), inputs) for out in (ours, theirs)]
    for a, b in zip((*ours, *gradients[0]), (*theirs, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_fusion_in_bfloat16_stays_as_close_to_float64_as_its_textbook_form():
    torch.manual_seed(0)
    fusion = Fusion(64, 128, 4, dropout=0.0)
    torch.nn.init.ones_(fusion.image_scale)
    torch.nn.init.ones_(fusion.text_scale)
    inputs = (torch.randn(1, 50, 64), torch.randn(1, 5, 64))
    masks = (torch.ones(1, 50, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool))
    with torch.no_grad():
        exact = textbook_fusion(fusion.double(), *(x.double() for x in inputs), *masks)
        half = fusion.bfloat16()
        ours = half(*(x.bfloat16() for x in inputs), *masks)
        textbook = textbook_fusion(half, *(x.bfloat16() for x in inputs), *masks)
    for a, b, reference in zip(ours, textbook, exact, strict=True):
        assert (a.double() - reference).abs().mean() < 1.5 * (b.double() - reference).abs().mean() + 1e-3
