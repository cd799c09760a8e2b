"""Noun phrases and subjects, with the rules and with a tagger whose data is installed."""

import doctest

import nltk
import pytest

from groundingdino.inputs import noun_phrases as module
from groundingdino.inputs.noun_phrases import noun_phrases, phrase_prompt, subject_span, subject_tokens, which_tagger
from groundingdino.inputs.text import default_tokenizer, finish_caption


@pytest.fixture()
def no_tagger_data(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    module._nltk_tagger.cache_clear()
    yield
    module._nltk_tagger.cache_clear()


@pytest.fixture()
def tagger_data(monkeypatch, tmp_path):
    """NLTK's own perceptron, trained on five sentences and laid out as `nltk.download` would."""
    sentences = [
        "the/DT zorp/NN on/IN the/DT table/NN",
        "a/DT blick/JJ dog/NN zorps/VBZ",
        "blick/JJ table/NN",
        "a/DT dog/NN 's/POS blick/JJ zorp/NN",
        "the/DT dog/NN runs/VBZ on/IN a/DT table/NN ./.",
    ]
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    folder = tmp_path / "taggers" / "averaged_perceptron_tagger_eng"
    folder.mkdir(parents=True)
    tagger = nltk.PerceptronTagger(load=False)
    tagger.train([[tuple(pair.split("/")) for pair in sentence.split()] for sentence in sentences * 8], nr_iter=8)
    tagger.save_to_json(lang="eng", loc=str(folder))
    module._nltk_tagger.cache_clear()
    yield
    module._nltk_tagger.cache_clear()


def test_the_docstrings_example_holds():
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=2)


def texts(caption, tagger="rules"):
    return [caption[start:end] for start, end in noun_phrases(caption, tagger)]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("There is two cat and a remote in the picture", ["cat", "a remote", "the picture"]),
        ("a man riding a horse on the beach", ["a man", "a horse", "the beach"]),
        ("The smiling Woman in a striped shirt is parked. ", ["The smiling Woman", "a striped shirt"]),
        ("woman's hand-held umbrella (blue), 2 cats", ["woman's hand-held umbrella", "cats"]),
        ("people riding horses; kid, kids!", ["people", "horses", "kid", "kids"]),
        ('a "red" car. A dog? the tallest building', ['a "red" car', "A dog", "the tallest building"]),
        ("running", []),
        ("", []),
        (" . ? ! ", []),
    ],
)
def test_rules_find_the_noun_phrases_of_captions(caption, expected):
    assert texts(caption) == expected


def test_a_phrase_that_occurs_twice_has_two_spans_and_names_stay_aligned():
    prompt = phrase_prompt("a dog next to a dog and a cat", "rules")
    assert prompt.names == ("a dog", "a dog", "a cat")
    assert prompt.spans == (((0, 5),), ((14, 19),), ((24, 29),))
    assert prompt.caption == "a dog next to a dog and a cat. "


def test_without_data_auto_means_rules_and_nltk_is_refused(no_tagger_data):
    assert which_tagger() == "rules"
    assert texts("a small dog", "auto") == ["a small dog"]
    with pytest.raises(ValueError, match="data is not installed"):
        which_tagger("nltk")
    with pytest.raises(ValueError, match="unknown tagger"):
        which_tagger("spacy")


def test_with_data_auto_means_nltk_and_its_tags_decide(tagger_data):
    assert which_tagger() == "nltk"
    assert texts("a blick dog zorps on the table", "auto") == ["a blick dog", "the table"]
    assert texts("a blick dog zorps on the table", "rules") == ["a blick dog zorps", "the table"]
    assert texts("the dog 's blick zorp", "nltk") == ["the dog 's blick zorp"]


def test_nothing_to_find_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="no noun phrase found in 'running'"):
        phrase_prompt("running", "rules")


@pytest.mark.parametrize(
    ("caption", "subject"),
    [
        ("man in red shirt on the left", "man"),
        ("second zebra from right", "second zebra"),
        ("left most guy", "left most guy"),
        ("round blue patch on her chest", "round blue patch"),
        ("black helmet bottom right", "black helmet"),
        ("the small square left of the orange light", "the small square"),
        ("light orange square shirt", "light orange square shirt"),
        ("orange far left", "orange"),
        ("the second small circle from the right", "the second small circle"),
        ("on the left side, a small dog", "a small dog"),
        ("the one in the red shirt", "the one"),
        ("giraffe's head that is up highest", "giraffe's head"),
        ("bottom right", None),
    ],
)
def test_the_subject_is_the_first_phrase_that_is_not_just_a_place(caption, subject):
    span = subject_span(caption, "rules")
    assert (span and caption[span[0] : span[1]]) == subject


def test_subject_tokens_are_those_of_the_phrase_or_else_of_all_words():
    caption = finish_caption("the hand-held umbrella on the left")
    encoded = default_tokenizer().encode(caption)
    assert subject_tokens(caption, encoded, "rules") == [1, 2, 3, 4, 5]
    caption = finish_caption("bottom right?")
    assert subject_tokens(caption, default_tokenizer().encode(caption), "rules") == [1, 2]
