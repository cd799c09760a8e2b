"""Losses and gradients against mmdet's, and the corners of matching."""

from dataclasses import replace

import pytest
import torch
from golden_cases import DECODER_LAYERS, load_case, recorded_noise, tiny_model, training_batch

from groundingdino.checkpoints.formats.mmdet import to_mmdet, to_native
from groundingdino.model import DenoisingOutput, DetectorOutput
from groundingdino.model.denoising import draw_noise, num_groups, self_attention_mask
from groundingdino.structures import Prediction, Targets
from groundingdino.training.criterion import Criterion
from groundingdino.training.matcher import match

LOSS_TOLERANCE = 1e-6  # relative; measured 3e-7
GRADIENT_TOLERANCE = 1e-4  # relative to the largest entry
# A key bias shifts every score of a softmax alike: its gradient is zero, and what is left is rounding.
GRADIENT_FLOOR = 1e-7
TRAIN_CASES = ("one_image", "mixed_batch", "empty_target")


@pytest.mark.parametrize("name", TRAIN_CASES)
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.usefixtures("each_path")
def test_losses_and_gradients_equal_mmdets(name, recompute):
    case, golden = load_case("train", name)
    images, text, targets = training_batch(case, golden)
    model = tiny_model().train()
    model.set_activation_checkpointing(recompute)
    losses = Criterion()(model(images, text, targets, recorded_noise(golden, targets)), targets)
    assert losses.keys() == case["losses"].keys()
    for term, theirs in case["losses"].items():
        assert losses[term].item() == pytest.approx(theirs, rel=LOSS_TOLERANCE), term
    total = torch.stack(list(losses.values())).sum()
    assert total.item() == pytest.approx(case["total"], rel=LOSS_TOLERANCE)

    total.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    ours = to_mmdet(gradients, DECODER_LAYERS)
    assert case["grad_norms"].keys() == ours.keys()
    for theirs, norm in case["grad_norms"].items():
        assert ours[theirs].norm().item() == pytest.approx(norm, rel=GRADIENT_TOLERANCE, abs=GRADIENT_FLOOR), theirs
    stored = {key.removeprefix("grad."): value for key, value in golden.items() if key.startswith("grad.")}
    assert len(stored) > 200
    for key, theirs in to_native(stored, DECODER_LAYERS).items():
        limit = GRADIENT_TOLERANCE * theirs.abs().max().item() + GRADIENT_FLOOR
        assert (gradients[key] - theirs).abs().max().item() < limit, key


def random_targets(counts, tokens=6):
    objects = max(*counts, 1)
    valid = torch.arange(objects) < torch.tensor(counts)[:, None]
    boxes = torch.rand(len(counts), objects, 4) * 0.4 + 0.2
    named = (torch.rand(len(counts), objects, tokens) < 0.4) & valid[..., None]
    return Targets(boxes * valid[..., None], named, torch.zeros(valid.shape, dtype=torch.int64), valid, tuple(counts))


def random_answers(answers, batch, queries, tokens=6):
    return torch.randn(answers, batch, queries, tokens), torch.rand(answers, batch, queries, 4) * 0.4 + 0.2


def test_every_object_gets_a_query_of_its_own_and_padding_gets_nobody():
    targets = random_targets([3, 0, 1])
    matched = match(*random_answers(4, 3, 10), targets)
    assert matched.shape == (4, 3, 3)
    assert (matched[:, 1] == 10).all() and (matched[:, 2, 1:] == 10).all()
    for row in matched[:, 0]:
        assert row.unique().numel() == 3 and (row < 10).all()


def test_the_matcher_finds_predictions_that_are_the_objects_themselves():
    targets = random_targets([2, 2])
    logits, boxes = random_answers(1, 2, 8)
    order = torch.tensor([5, 2])
    logits[:, :, order] = targets.positive_map.float() * 20 - 10
    boxes[:, :, order] = targets.boxes
    assert torch.equal(match(logits, boxes, targets), order.expand(1, 2, 2))


def test_of_two_queries_in_one_place_the_one_that_names_less_besides_is_matched():
    targets = random_targets([1])
    targets.positive_map[:] = torch.arange(6) == 0
    logits, boxes = torch.full((1, 1, 2, 6), -3.0), targets.boxes.expand(1, 1, 2, 4)
    logits[..., 0] = 1.0
    for other in (0, 1):
        more = logits.clone()
        more[:, :, other, 3] = 2.0
        assert match(more, boxes, targets).item() == 1 - other


def random_output(targets, queries, groups=2):
    logits, boxes = random_answers(2, len(targets.counts), queries)
    dn_queries = groups * 2 * targets.valid.shape[1]
    dn_logits, dn_boxes = random_answers(1, len(targets.counts), dn_queries)
    denoising = DenoisingOutput((Prediction(dn_logits[0], dn_boxes[0]),), groups)
    return DetectorOutput((Prediction(logits[0], boxes[0]),), Prediction(logits[1], boxes[1]), denoising)


def test_more_objects_than_queries_leaves_some_objects_alone():
    targets = random_targets([7])
    matched = match(*random_answers(2, 1, 4), targets)
    assert ((matched < 4).sum(dim=-1) == 4).all()
    losses = Criterion()(random_output(targets, queries=4), targets)
    assert all(term.isfinite() and term > 0 for term in losses.values())


def test_predictions_that_are_not_finite_end_in_a_loss_that_says_so_not_in_a_crash():
    targets = random_targets([2])
    output = random_output(targets, queries=8)
    output.layers[0].logits[0, 3] = float("nan")
    losses = Criterion()(output, targets)
    assert not losses["loss_cls"].isfinite() and losses["enc_loss_cls"].isfinite()


def test_loss_terms_are_the_same_whatever_text_padding_a_batch_brings():
    targets = random_targets([2, 1])
    output = random_output(targets, queries=8)

    def padded(prediction):
        empty = torch.full((*prediction.logits.shape[:-1], 3), float("-inf"))
        return Prediction(torch.cat((prediction.logits, empty), dim=-1), prediction.boxes)

    wider = DetectorOutput(
        tuple(map(padded, output.layers)),
        padded(output.proposals),
        DenoisingOutput(tuple(map(padded, output.denoising.layers)), output.denoising.groups),
    )
    named = torch.cat((targets.positive_map, torch.zeros(2, 2, 3, dtype=torch.bool)), dim=-1)
    ours, theirs = Criterion()(output, targets), Criterion()(wider, replace(targets, positive_map=named))
    assert all(ours[term].item() == pytest.approx(theirs[term].item(), rel=1e-6) for term in ours)


def test_a_batch_without_any_object_trains_every_parameter_to_name_nothing():
    case, golden = load_case("train", "one_image")
    images, text, targets = training_batch(case, golden)
    empty = replace(
        targets,
        boxes=torch.zeros(1, 1, 4),
        positive_map=torch.zeros(1, 1, text.token_ids.shape[1], dtype=torch.bool),
        labels=torch.zeros(1, 1, dtype=torch.int64),
        valid=torch.zeros(1, 1, dtype=torch.bool),
        counts=(0,),
    )
    model = tiny_model().train()
    losses = Criterion()(model(images, text, empty), empty)
    assert losses["loss_cls"] > 0
    assert all(value == 0 for term, value in losses.items() if "bbox" in term or "iou" in term or "dn" in term)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_detector_without_targets_cannot_be_scored():
    case, golden = load_case("train", "one_image")
    images, text, targets = training_batch(case, golden)
    with torch.no_grad(), pytest.raises(ValueError, match="without targets"):
        Criterion()(tiny_model()(images, text), targets)


def test_boxes_without_area_give_finite_losses_and_gradients():
    case, golden = load_case("train", "one_image")
    images, text, targets = training_batch(case, golden)
    flat = replace(targets, boxes=targets.boxes * torch.tensor([1.0, 1.0, 0.0, 1.0]))
    model = tiny_model().train()
    torch.stack(list(Criterion()(model(images, text, flat), flat).values())).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_drawn_noise_has_the_shape_of_the_batch_and_follows_the_seed():
    targets = random_targets([3, 1])
    draws = []
    for _ in range(2):
        torch.manual_seed(1)
        draws.append(draw_noise(targets, num_denoising=100, num_labels=256))
    assert draws[0].box_draw.shape == (2, 33, 2, 3, 4)
    assert all(torch.equal(a, b) for a, b in zip(vars(draws[0]).values(), vars(draws[1]).values(), strict=True))
    assert draws[0].box_sign.unique().tolist() == [-1, 1] and draws[0].label_random.max() < 256


def test_the_number_of_groups_fills_the_budget_but_is_at_least_one():
    assert [num_groups(counts, 100) for counts in ((1,), (3, 2), (101,), (0, 0))] == [100, 33, 1, 1]


def test_denoising_groups_see_themselves_and_the_matching_queries_which_see_only_each_other():
    mask = self_attention_mask(num_denoising=4, group_size=2, num_matching=3, device=torch.device("cpu"))
    expected = ["1100111", "1100111", "0011111", "0011111", "0000111", "0000111", "0000111"]
    assert ["".join(str(int(x)) for x in row) for row in mask] == expected
