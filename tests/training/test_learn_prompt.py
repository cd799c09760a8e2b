"""A name's token features learned from boxes: they find more, fit into a small file, and change nothing else."""

import copy

import numpy as np
import pytest
import torch
from golden_cases import tiny_model
from PIL import Image
from torchvision.ops import box_iou

import groundingdino as gd
from groundingdino.checkpoints.model_file import SCALE_KEY, save_detector
from groundingdino.inference.learned_prompt import read_learned_prompt
from groundingdino.inference.predictor import Predictor
from groundingdino.inference.vocabulary import Vocabulary, read_vocabulary

NAME, OTHERS = "traffic cone", ["dog", "cat"]  # two tokens: traffic, cone
SETTINGS = gd.PromptLearning(steps=40, lr=0.3, beside=OTHERS)


@pytest.fixture(scope="module")
def predictor():
    return Predictor(tiny_model(), scale=(64, 96))


@pytest.fixture(scope="module")
def examples():
    """Four images of noise, a red square in three of them, and the squares' boxes."""
    rng, images, boxes = np.random.default_rng(1), [], []
    for x, y, side in ((10, 8, 30), (40, 20, 24), (30, 5, 36), (0, 0, 0)):
        pixels = rng.integers(0, 90, (64, 96, 3), dtype=np.uint8)
        pixels[y : y + side, x : x + side] = (250, 20, 20)
        images.append(Image.fromarray(pixels))
        boxes.append([[x, y, x + side, y + side]] if side else [])
    return images, boxes


@pytest.fixture(scope="module")
def learned(predictor, examples):
    return gd.learn_prompt(*examples, NAME, predictor, SETTINGS)


def same(one, other):
    return torch.equal(one.boxes, other.boxes) and torch.equal(one.scores, other.scores) and one.names == other.names


def lead(predictor, examples, name):
    """How far the boxes next to objects score above the mean box; the mean over the images with an object."""
    leads = []
    for image, boxes in zip(*examples, strict=True):
        found = predictor.predict(image, categories=[name, *OTHERS], threshold=0.0)
        rows = found.labels == 0
        if boxes:
            near = box_iou(found.boxes[rows], torch.tensor(boxes, dtype=torch.float32))[:, 0].argmax()
            leads.append(float(found.scores[rows][near] / found.scores[rows].mean()))
    return sum(leads) / len(leads)


def test_boxes_next_to_the_objects_score_higher_with_the_learned_name(predictor, examples, learned, tmp_path):
    learned.save(tmp_path / "cone.prompt")
    plain, better = (lead(predictor, examples, name) for name in (NAME, str(tmp_path / "cone.prompt")))
    assert better > 1.2 * plain


def test_weights_random_state_and_every_other_prompt_stay_bit_equal(predictor, examples):
    weights, state = copy.deepcopy(predictor.model.state_dict()), torch.get_rng_state()
    before = predictor.predict(examples[0], categories=[*OTHERS, NAME], threshold=0.0)
    gd.learn_prompt(*examples, NAME, predictor, gd.PromptLearning(steps=2))
    assert all(torch.equal(value, weights[key]) for key, value in predictor.model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in predictor.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    after = predictor.predict(examples[0], categories=[*OTHERS, NAME], threshold=0.0)
    assert all(map(same, before, after))


def test_the_file_is_a_few_kilobytes_and_stands_in_the_place_of_a_name(predictor, examples, learned, tmp_path):
    path = tmp_path / "cone.prompt"
    learned.save(path)
    assert path.stat().st_size < 4000
    back = read_learned_prompt(path)
    assert back.name == NAME and torch.equal(back.tokens, learned.tokens)
    image = examples[0][0]
    plain, found = (
        predictor.predict(image, categories=["dog", name, "cat"], threshold=0.0) for name in (NAME, str(path))
    )
    assert not same(plain, found) and set(found.names) == {"dog", NAME, "cat"}  # shown by its name
    (tmp_path / "names.yaml").write_text(f"- dog\n- name: cone\n  prompts: [{path}, traffic cone]\n- cat\n")
    vocabulary = read_vocabulary(tmp_path / "names.yaml")
    alone = Vocabulary((vocabulary.names[0], *plain_cone(path), vocabulary.names[2]))
    assert set(predictor.predict(image, vocabulary, threshold=0.0).names) == {"dog", "cone", "cat"}
    by_vocabulary = predictor.predict(image, alone, threshold=0.0)
    assert torch.equal(by_vocabulary.boxes, found.boxes) and torch.equal(by_vocabulary.scores, found.scores)
    for file, lines in (("names.txt", f"dog\n{path}\n"), ("list.yaml", f"- dog\n- {path}\n")):
        (tmp_path / file).write_text(lines)
        assert read_vocabulary(tmp_path / file).shown == ("dog", NAME)
    (tmp_path / "names.txt").write_text("gone.prompt\n")
    with pytest.raises(ValueError, match="gone.prompt: no such file"):
        read_vocabulary(tmp_path / "names.txt")


def plain_cone(path):
    from groundingdino.inference.vocabulary import Name

    return (Name("cone", (str(path),)),)


def test_the_command_line_takes_it(learned, examples, tmp_path, capsys):
    from groundingdino.cli.main import main

    learned.save(tmp_path / "cone.prompt")
    save_detector(tmp_path / "tiny.safetensors", tiny_model(), {SCALE_KEY: "[64, 96]"})
    examples[0][0].save(tmp_path / "photo.png")
    command = ["predict", tmp_path / "photo.png", "--checkpoint", tmp_path / "tiny.safetensors", "--threshold", 0]
    assert main([str(word) for word in [*command, "--categories", f"dog, {tmp_path / 'cone.prompt'}"]]) == 0
    assert '"name": "traffic cone"' in capsys.readouterr().out


def test_what_cannot_be_learned_or_used_is_one_line(predictor, examples, learned, tmp_path):
    images, boxes = examples
    for arguments, message in [
        ((images[:2], boxes, NAME), "2 images and boxes of 4"),
        ((images[3:], boxes[3:], NAME), "no box in any image"),
        ((images[:1], [[[5, 5, 3, 9]]], NAME), "x1 < x2"),
        ((images, boxes, "(a)"), "is empty once cleaned"),
    ]:
        with pytest.raises(ValueError, match=message):
            gd.learn_prompt(*arguments, predictor)
    with pytest.raises(ValueError, match="ends in .prompt"):
        learned.save(tmp_path / "cone.txt")
    other = gd.LearnedPrompt(NAME, learned.tokens, "mm_gdino_b")
    other.save(tmp_path / "other.prompt")
    save_detector(tmp_path / "weights.prompt", tiny_model())
    gd.LearnedPrompt(NAME, learned.tokens[0], learned.model).save(tmp_path / "vector.prompt")
    for name, message in [
        ("gone.prompt", "no such file"), ("other.prompt", "was learned with mm_gdino_b"),
        ("weights.prompt", "no learned prompt of groundingdino"),
        ("vector.prompt", "no learned prompt of groundingdino"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            predictor.predict(images[0], categories=["dog", str(tmp_path / name)])
