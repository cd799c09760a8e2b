"""Noun phrases of a caption as character spans, and the phrase a referring expression is about. Never downloads.

Part-of-speech tags are those of NLTK's averaged perceptron, whose weights are part of the package, so that results do
not depend on what NLTK data a user has installed. They feed the grammar of mmdet
`models/detectors/glip.py::find_noun_phrases`. Unlike there, a phrase is the place where it stands: no second search
through the text, so that spans and names stay aligned when a phrase occurs twice; punctuation ends a phrase, and a
possessor belongs to it ("the woman's umbrella" is one thing).
"""

import gzip
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from groundingdino.inputs.text import EncodedCaption, Prompt, Span, finish_caption, tokens_of_spans

GRAMMAR = "NP: {<DT>?<JJ.*>*<NN.*>+(<POS><JJ.*>*<NN.*>+)*}"
LLMDET_GRAMMAR = "NP: {<DT>?<JJ>*<NN|NNS>}"
TAGGER = "NLTK's averaged perceptron"  # for reports
# {"weights": feature -> tag -> weight, "tagdict": word -> tag, "classes": [tag, ...]}
_TAGGER_FILE = Path(__file__).parent / "assets" / "averaged_perceptron_tagger_eng.json.gz"

_PLACES = frozenset(
    "left right middle center centre far near front back top bottom upper lower corner side edge end leftmost "
    "rightmost picture image photo frame screen row".split()
)
_DIRECTIONS = frozenset("left right middle center centre top bottom".split())
_ONE = frozenset({"one", "ones"})
# Of NLTK's English stop words, those that the tagger takes for a noun.
_STOP_WORDS = frozenset(
    "i myself ours ourselves yours yourselves her hers herself theirs have do because while about through before above "
    "below off over further s t d ll m o re ve y don ain ma won".split()
)
_ARTICLES = frozenset("a an the this that these those each every some any no all both either neither another".split())


@cache
def _tagger() -> Any:
    from nltk.tag.perceptron import PerceptronTagger

    content = json.loads(gzip.decompress(_TAGGER_FILE.read_bytes()))
    tagger = PerceptronTagger(load=False)
    tagger.model.weights, tagger.tagdict = content["weights"], content["tagdict"]
    tagger.classes = tagger.model.classes = set(content["classes"])
    return tagger


@cache
def _parser(grammar: str) -> Any:
    from nltk import RegexpParser

    return RegexpParser(grammar)


def _chunks(tags: Sequence[str], grammar: str) -> list[list[int]]:
    """The word indices of each noun phrase."""
    tree = _parser(grammar).parse(list(enumerate(tags)))
    return [[index for index, _ in subtree.leaves()] for subtree in tree.subtrees(lambda t: t.label() == "NP")]


def _words(caption: str) -> list[Span]:
    """The spans of the words and punctuation marks, by NLTK's Treebank tokenizer (code only)."""
    from nltk.tokenize import NLTKWordTokenizer

    spans = []
    for sentence in re.finditer(r"[^.?!\s](?:[^.?!]|[.?!](?=\S))*[.?!]*", caption):
        text = sentence.group().replace('"', " ")  # the tokenizer writes `` for ", its spans would have to be searched
        spans += [(sentence.start() + a, sentence.start() + b) for a, b in NLTKWordTokenizer().span_tokenize(text)]
    return spans


def noun_phrases(caption: str) -> tuple[Span, ...]:
    """The character spans of the noun phrases, in reading order; the same words twice are two spans.

    >>> caption = "a dog next to a dog and two cats"
    >>> [caption[start:end] for start, end in noun_phrases(caption)]
    ['a dog', 'a dog', 'cats']
    """
    spans = _words(caption)
    words = [caption[start:end].lower() for start, end in spans]
    if not words:
        return ()
    tags = _corrected(words, [tag for _, tag in _tagger().tag(words)])
    return tuple((spans[indices[0]][0], spans[indices[-1]][1]) for indices in _chunks(tags, GRAMMAR))


def _corrected(words: list[str], tags: list[str]) -> list[str]:
    """The tags without the tagger's habitual mistakes in captions: it was trained on newspapers."""
    result = list(tags)
    for index, (word, tag) in enumerate(zip(words, tags, strict=True)):
        before = tags[index - 1] if index else ""
        after = tags[index + 1] if index + 1 < len(tags) else ""
        if not any(character.isalnum() for character in word):
            result[index] = "."  # a mark is no noun
        elif word in _ONE:
            result[index] = "NN"  # "the left one" is one thing
        elif word == "left" and tag.startswith("VB"):
            result[index] = "JJ"
        elif tag in ("VBG", "VBN") and before in ("DT", "JJ", "IN", "PRP$") and after.startswith(("NN", "JJ")):
            result[index] = "JJ"  # "the smiling woman", "a striped shirt"; but "woman holding flowers"
    return result


def phrase_prompt(caption: str) -> Prompt:
    """The finished caption with one entry per noun phrase.

    Raises:
        ValueError: if there is no noun phrase.
    """
    spans = noun_phrases(caption)
    if not spans:
        raise ValueError(f"no noun phrase found in {caption!r}: name the spans, or pass it as categories or referring")
    return Prompt(finish_caption(caption), tuple((span,) for span in spans), tuple(caption[a:b] for a, b in spans))


def subject_span(caption: str) -> Span | None:
    """The span of what a referring expression is about: its first noun phrase that is not just a place.

    "man in red on the left" -> "man"; "on the left side, a small dog" -> "a small dog". None where there is no such
    phrase, as in "bottom right". Directions at its end do not belong to it: "black helmet bottom right".
    """
    for start, end in noun_phrases(caption):
        words = list(re.finditer(r"\w+", caption[start:end].lower()))
        while len(words) > 1 and words[-1].group() in _DIRECTIONS:
            words.pop()
        if not all(word.group() in _PLACES or word.group() in _ARTICLES for word in words):
            return start, start + words[-1].end()
    return None


def subject_tokens(caption: str, encoded: EncodedCaption) -> list[int]:
    """The token indices of the subject phrase, or of all words where there is none; for `scoring="subject"`.

    `encoded` is the tokenised caption, finished or not; special tokens are never among the indices.
    """
    span = subject_span(caption)
    tokens = tokens_of_spans(encoded, [[span]])[0] if span else []
    return tokens or [
        index
        for index, (start, end) in enumerate(encoded.offsets)
        if start < end and any(character.isalnum() for character in caption[start:end])
    ]


def llmdet_spans(caption: str) -> tuple[Span, ...]:
    """The spans that LLMDet scores in an expression that has its final "." (`grounding_dino.py::get_rec_phrase`).

    That is every occurrence, also inside other words, of its first noun phrase with one noun that is no stop word; the
    whole caption where there is none. Unlike `subject_span` it takes the tagger's word for everything.
    """
    spans = _words(caption)
    words = [caption[start:end] for start, end in spans]
    tags = [tag for _, tag in _tagger().tag(words)] if words else []
    phrases = (" ".join(words[index] for index in indices) for indices in _chunks(tags, LLMDET_GRAMMAR))
    phrase = next((phrase for phrase in phrases if phrase.lower() not in _STOP_WORDS), caption)
    found = tuple((match.start(), match.end()) for match in re.finditer(re.escape(phrase), caption))
    return found or ((0, len(caption) - 1),)
