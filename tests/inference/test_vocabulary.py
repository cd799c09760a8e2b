"""Vocabularies: what a file may say, what is packaged, and how prompts and negatives become names."""

import json
import logging

import pytest
import torch
from golden_cases import tiny_model
from PIL import Image

from groundingdino.cli import main as command_line
from groundingdino.inference import postprocess, prompts
from groundingdino.inference.engine import RankedBoxes
from groundingdino.inference.predictor import Predictor
from groundingdino.inference.prompts import Categories, resolve
from groundingdino.inference.vocabulary import Name, Vocabulary, plain_names, read_vocabulary
from groundingdino.inputs.text import default_tokenizer, unreadable_words

YAML = """
- bicycle
- name: forklift
  prompts: [forklift, fork lift truck]
  negatives: [pallet jack]
  threshold: 0.35
- 6
"""
FORKLIFTS = Vocabulary((
    Name("bicycle"),
    Name("forklift", ("forklift", "fork lift truck"), ("pallet jack",), 0.35),
    Name("6"),
))  # fmt: skip


@pytest.fixture(scope="module")
def predictor():
    return Predictor(tiny_model(), scale=(96, 160))


@pytest.fixture
def photo(golden):
    return golden / "photos" / "train2014" / "COCO_train2014_000000000001.jpg"


def test_a_yaml_file_and_a_list_of_lines_are_read(tmp_path):
    (tmp_path / "names.yaml").write_text(YAML)
    assert read_vocabulary(tmp_path / "names.yaml") == FORKLIFTS
    (tmp_path / "under.yml").write_text("names:\n" + YAML.replace("\n", "\n  "))
    assert read_vocabulary(str(tmp_path / "under.yml")) == FORKLIFTS
    (tmp_path / "names.txt").write_text("cat\n\n remote control \n")
    assert read_vocabulary(tmp_path / "names.txt") == plain_names(["cat", "remote control"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "names.yaml: no names"),
        ("cat", "expected a list of names, got str"),
        ("- {name: cat, promts: [a]}", "entry 1: Object contains unknown field `promts`"),
        ("- cat\n- {prompts: [a]}", "entry 2: Object missing required field `name`"),
        ("- no", "entry 1: YAML reads one of its words as False: put it in quotes"),
        ("- cat\n- cat", "the name 'cat' occurs twice"),
        ("- cat\n- {name: tom, prompts: [cat]}", "the prompt 'cat' belongs to 'cat' and 'tom'"),
        ("- {name: cat, negatives: [cat]}", "'cat' is a prompt of 'cat' and its negative"),
        ("- {name: cat, threshold: 30}", "threshold 30.0 of 'cat' is not in"),
        ("- {name: cat, threshold: high}", "entry 1: Expected `float | null`, got `str`"),
        ("- {name: cat, prompts: ['(all)']}", "'(all)' of 'cat' is empty"),
        ("- {name: cat, prompts: ['a [cat']}", "one pair of brackets"),
        ("- [cat, dog", "names.yaml: not YAML"),
        ("- {name: cat, 3: [a]}", "entry 1"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_it(tmp_path, monkeypatch, text, message):
    (tmp_path / "names.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        read_vocabulary(tmp_path / "names.yaml")
    assert "names.yaml: " in str(caught.value) and message in str(caught.value)


def test_a_name_that_is_neither_file_nor_list_says_which_lists_there_are():
    with pytest.raises(ValueError, match="coc: no such file, nor a packaged list of names .coco, lvis"):
        read_vocabulary("coc")
    with pytest.raises(ValueError, match="no ODinW data set 'pot': use one of AerialMaritimeDrone_large"):
        read_vocabulary("odinw/pot")


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("coco", 80, "person", "toothbrush"),
        ("lvis", 1203, "aerosol_can", "zucchini"),
        ("objects365", 365, "person", "flashlight"),
        ("v3det", 13204, "ashtray", None),
        ("odinw/dice", 6, "1", "6"),
    ],
)
def test_the_lists_are_packaged(name, count, first, last):
    vocabulary = read_vocabulary(name)
    assert (len(vocabulary.names), vocabulary.shown[0]) == (count, first)
    assert last in (None, vocabulary.shown[-1])
    assert len(set(vocabulary.texts)) == count
    if count < 2000:
        most = max(len(chunk.positive_map) for chunk in resolve(vocabulary, default_tokenizer()).chunks)
        assert most <= 40 or name != "lvis"


def test_plain_names_are_asked_as_a_list_of_categories(predictor, photo):
    ours = predictor.predict(photo, plain_names(["helmet", "flag"]), threshold=0.0)
    theirs = predictor.predict(photo, Categories(["helmet", "flag"]), threshold=0.0)
    assert torch.equal(ours.boxes, theirs.boxes) and ours.names == theirs.names


def test_brackets_score_their_words_and_read_the_others():
    vocabulary = Vocabulary((Name("package", ("there is a [big_package (red)] on the porch",)), Name("cat")))
    (chunk,) = resolve(vocabulary, default_tokenizer()).chunks
    scored = [
        [default_tokenizer().decode([chunk.caption.token_ids[i]]) for i in row.nonzero()[:, 0].tolist()]
        for row in chunk.positive_map
    ]
    assert scored == [["big", "package"], ["cat"]]
    assert default_tokenizer().decode(chunk.caption.token_ids) == "there is a big package on the porch. cat."


def fold(texts: list[int], scores: list[float], boxes: list[list[float]]) -> list[tuple[int, int]]:
    """(row, name) of what FORKLIFTS makes of rows; its texts are bicycle, forklift, fork lift truck, pallet jack, 6."""
    ranked = torch.tensor(boxes), torch.tensor(scores), torch.tensor(texts, dtype=torch.long)
    rows, names = postprocess.fold(*ranked, FORKLIFTS.roles)
    return list(zip(rows.tolist(), names.tolist(), strict=True))


BOX, NEAR, FAR = [0.0, 0, 10, 10], [0.0, 0, 10, 9], [20.0, 20, 30, 30]


def test_an_ensemble_keeps_the_best_box_of_each_object():
    assert FORKLIFTS.texts == ("bicycle", "forklift", "fork lift truck", "pallet jack", "6")
    assert fold([2, 1, 1], [0.9, 0.8, 0.7], [BOX, NEAR, FAR]) == [(0, 1), (2, 1)]
    assert fold([0, 0], [0.9, 0.8], [BOX, NEAR]) == [(0, 0), (1, 0)]  # a single prompt is left as it is


def test_a_negative_takes_away_what_it_fits_better_and_is_never_reported():
    assert fold([3, 1, 2], [0.9, 0.8, 0.7], [BOX, NEAR, FAR]) == [(2, 1)]
    assert fold([1, 3], [0.9, 0.8], [BOX, NEAR]) == [(0, 1)]  # it fits worse
    assert fold([3, 0, 4], [0.9, 0.8, 0.7], [BOX, BOX, BOX]) == [(1, 0), (2, 2)]  # negative of another name


def test_folding_nothing_gives_nothing():
    empty = RankedBoxes(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert len(empty.folded(FORKLIFTS).labels) == 0


def test_the_predictor_folds_and_heeds_a_names_own_threshold(predictor, photo):
    vocabulary = Vocabulary((Name("helmet", ("helmet", "hard hat"), ("cap",)), Name("flag", threshold=1.0)))
    found = predictor.predict(photo, vocabulary, threshold=0.0)
    assert set(found.names) == {"helmet"} and set(found.labels.tolist()) == {0}
    flat = predictor.predict(photo, categories=list(vocabulary.texts), threshold=0.0)
    own = RankedBoxes(flat.boxes, flat.scores, flat.labels).folded(vocabulary)
    assert torch.equal(own.boxes[own.labels == 0], found.boxes)
    again = predictor.predict(photo, vocabulary.select(["flag", "ski"]), threshold=0.0)
    assert set(again.names) == {"ski"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("кот", ["'кот'"]),
        ("red 猫", ["'猫'"]),
        ("🐈", ["'🐈'"]),
        ("remote control", []),
        ("A", []),
        ("t\\", []),
        ("SUV", []),
        ("Aluminum-alloy ladder", []),
    ],
)
def test_a_prompt_of_single_letters_or_unknown_tokens_is_warned_of(caplog, name, words):
    prompts._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            resolve(plain_names([name]), default_tokenizer())
    assert len(caplog.messages) == bool(words)
    for word in words:
        assert word in caplog.text and "by single letters or not at all; translate it" in caplog.text


def test_the_packaged_lists_are_read_by_the_model():
    tokenizer = default_tokenizer()
    for name in ("coco", "lvis", "objects365"):
        assert not [text for text in read_vocabulary(name).texts if unreadable_words(text, tokenizer)]


def test_predict_takes_names_from_a_file(tmp_path, predictor, photo, monkeypatch, capsys):
    from groundingdino.cli import predict

    (tmp_path / "names.yaml").write_text("- {name: headgear, prompts: [helmet, hard hat]}")
    (tmp_path / "tiny.safetensors").touch()
    monkeypatch.setattr(predict.loading, "load_predictor", lambda *_: predictor)
    arguments = ["predict", photo, "--names", tmp_path / "names.yaml", "--checkpoint", tmp_path / "tiny.safetensors"]
    assert command_line.main([str(a) for a in (*arguments, "--threshold", "0", "--top-k", "2")]) == 0
    row = json.loads(capsys.readouterr().out)
    assert [found["name"] for found in row["detections"]] == ["headgear"] * 2
    with Image.open(photo) as image:
        assert row["detections"][0]["box"][2] <= image.width
