"""Noun phrases and subjects, the same whatever NLTK data is installed."""

import doctest
import os
import subprocess
import sys

import nltk
import pytest

from groundingdino.inputs import noun_phrases as module
from groundingdino.inputs.noun_phrases import llmdet_spans, noun_phrases, phrase_prompt, subject_span, subject_tokens
from groundingdino.inputs.text import default_tokenizer, finish_caption


def test_the_docstrings_example_holds():
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=2)


def texts(caption):
    return [caption[start:end] for start, end in noun_phrases(caption)]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("There is two cat and a remote in the picture", ["cat", "a remote", "the picture"]),
        ("a man riding a horse on the beach", ["a man", "a horse", "the beach"]),
        ("The smiling Woman in a striped shirt is parked. ", ["The smiling Woman", "a striped shirt"]),
        ("woman's hand-held umbrella (blue), 2 cats", ["woman's hand-held umbrella", "cats"]),
        ("the surfer carves through a huge wave", ["the surfer", "a huge wave"]),
        ("a chef slices tomatoes on a cutting board", ["a chef", "tomatoes", "a cutting board"]),
        ("a goalkeeper dives for the ball", ["a goalkeeper", "the ball"]),
        ("people riding horses; kid, kids!", ["people", "horses", "kid", "kids"]),
        ('a "red" car. A dog? the tallest building', ['a "red" car', "A dog", "the tallest building"]),
        ("running", []),
        ("", []),
        (" . ? ! ", []),
    ],
)
def test_the_noun_phrases_of_captions_are_found(caption, expected):
    assert texts(caption) == expected


def test_a_phrase_that_occurs_twice_has_two_spans_and_names_stay_aligned():
    prompt = phrase_prompt("a dog next to a dog and a cat")
    assert prompt.names == ("a dog", "a dog", "a cat")
    assert prompt.spans == (((0, 5),), ((14, 19),), ((24, 29),))
    assert prompt.caption == "a dog next to a dog and a cat. "


def test_the_result_is_the_same_whatever_nltk_data_is_installed(monkeypatch, tmp_path):
    """Another tagger stands where NLTK looks for its own; a process of its own, as a tagger is loaded once."""
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    folder = tmp_path / "taggers" / "averaged_perceptron_tagger_eng"
    folder.mkdir(parents=True)
    other = nltk.PerceptronTagger(load=False)
    other.train([[("the", "NN"), ("surfer", "VB"), ("wave", "DT")]] * 8, nr_iter=2)
    other.save_to_json(lang="eng", loc=str(folder))
    code = (
        "from groundingdino.inputs.noun_phrases import *; print(noun_phrases('the surfer carves through a huge wave'))"
    )
    environment = {**os.environ, "NLTK_DATA": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "((0, 10), (26, 37))\n"


def test_nothing_to_find_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="no noun phrase found in 'running'"):
        phrase_prompt("running")


@pytest.mark.parametrize(
    ("caption", "subject"),
    [
        ("man in red shirt on the left", "man"),
        ("second zebra from right", "second zebra"),
        ("left most guy", "left most guy"),
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
    span = subject_span(caption)
    assert (span and caption[span[0] : span[1]]) == subject


def test_subject_tokens_are_those_of_the_phrase_or_else_of_all_words():
    caption = finish_caption("the hand-held umbrella on the left")
    encoded = default_tokenizer().encode(caption)
    assert subject_tokens(caption, encoded) == [1, 2, 3, 4, 5]
    caption = finish_caption("bottom right?")
    assert subject_tokens(caption, default_tokenizer().encode(caption)) == [1, 2]


@pytest.mark.parametrize(
    ("caption", "scored"),
    [
        ("man in red shirt on the left. ", ["man"]),
        ("the tennis player. ", ["the tennis"]),  # one noun
        ("man beside a woman. ", ["man", "man"]),  # also inside "woman"
        ("second zebra from right. ", ["second zebra"]),
        ("very tall. ", ["very tall. "]),
        ("i mean the cat. ", ["the cat"]),
    ],
)
def test_llmdet_scores_every_occurrence_of_its_first_phrase(caption, scored):
    assert [caption[start:end] for start, end in llmdet_spans(caption)] == scored
