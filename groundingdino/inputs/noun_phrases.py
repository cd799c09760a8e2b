"""Noun phrases of a caption as character spans, and the phrase a referring expression is about. Never downloads.

Two part-of-speech taggers: NLTK's (`averaged_perceptron_tagger_eng`) where its data is installed, else rules: closed
lists for English function words and the verbs captions use, endings, and "noun" for everything else, on NLTK classes
that are code only. Both feed the grammar of mmdet `models/detectors/glip.py::find_noun_phrases`. Unlike there, a phrase
is the place where it stands: no second search through the text, so that spans and names stay aligned when a phrase
occurs twice; punctuation ends a phrase, and a possessor belongs to it ("the woman's umbrella" is one thing).
"""

import re
from functools import cache
from typing import Any, Literal

from groundingdino.inputs.text import EncodedCaption, Prompt, Span, finish_caption, tokens_of_spans

Tagger = Literal["auto", "nltk", "rules"]

GRAMMAR = "NP: {<DT>?<JJ.*>*<NN.*>+(<POS><JJ.*>*<NN.*>+)*}"

# Tags of the Penn Treebank, as far as the grammar needs them apart.
_WORDS = {
    "DT": "a an the this that these those each every some any no all both either neither another",
    "IN": "in on at of with without by from to into onto over under above below behind between among near beside "
    "besides against along across around through during before after inside outside within upon off toward towards "
    "beneath underneath for as than like per via next away",
    "CC": "and or but nor & plus",
    "PRP": "i you he she it we they me him her us them his its their my your our who whom whose which what there here "
    "himself herself itself themselves someone somebody",
    "CD": "two three four five six seven eight nine ten eleven twelve",
    "RB": "not very just also only really partially partly mostly almost together apart up down out so too then where "
    "when while if",
    "VB": "is are was were be been being am has have had do does did can could will would should may might must "
    "sits sit sat stands stand stood holds hold held wears wear wore worn rides ride rode walks walk runs run ran "
    "plays jumps jump looks look looked leans leaning eats eat drinks drink lies lay lying flies fly flew goes go gone "
    "shows show carries carry pulls pushes throws throw hits catches catch swings cuts says say sees see find shown "
    "facing made seen taken",
    "JJ": "left right middle center centre far near front back top bottom upper lower leftmost rightmost "
    "topmost bottommost closest nearest furthest farthest first second third fourth fifth last most more less least "
    "big small large little tall short long tiny huge old young new red green blue yellow white black brown gray grey "
    "pink purple beige tan golden dark bright blond blonde other same own full empty open closed "
    "wooden sunny high low many few several main whole visible blurry round flat plain plaid furry fuzzy "
    "fluffy shiny thick thin wide narrow fat skinny chubby bald curly straight wavy blank wet dry dirty clean hot cold "
    "fresh ripe raw bare pale maroon teal navy violet turquoise khaki larger smaller bigger taller shorter longer "
    "closer nearer farther further older younger darker lighter brighter higher thicker thinner inner outer",
}
# An adjective before a noun or another adjective, else a noun: "orange shirt", "the orange left of it".
_EITHER = frozenset("orange light square oval silver male female adult".split())
_NOUNS_IN_ING = (
    "thing king ring string wing building ceiling railing clothing painting morning evening wedding swing spring sling "
    "earring something anything everything nothing crossing icing frosting pudding dressing topping sibling awning "
    "bring drawing meeting parking duckling dumpling stuffing pling ping"
)
_NOUNS_IN_ED = "bed shed seed feed weed speed sled reed breed"
_NOUNS_IN_EST = "forest chest guest nest vest test west breast request interest rest contest harvest priest quest crest"
_PLACES = frozenset(
    "left right middle center centre far near front back top bottom upper lower corner side edge end leftmost "
    "rightmost picture image photo frame screen row".split()
)
_ONE = frozenset({"one", "ones"})


@cache
def _tag_of_word() -> dict[str, str]:
    return {word: tag for tag, words in _WORDS.items() for word in words.split()}


def _rule_tags(words: list[str]) -> list[tuple[str, str]]:
    """Tags by list, by ending, else noun. A word in -ing or -ed describes what follows, after a noun it is a verb."""
    tags: list[str] = []
    for word, by_ending in _endings().tag(words):
        tag = _tag_of_word().get(word, by_ending)
        if tag in ("VBG", "VBN") and not (tags and tags[-1].startswith(("NN", "VB", "PRP"))):
            tag = "JJ"  # "the smiling woman", "striped shirt"; but "woman smiling", "is parked"
        tags.append(tag)
    for index in reversed(range(len(words) - 1)):
        if words[index] in _EITHER and tags[index + 1][:2] in ("JJ", "NN") and words[index + 1] not in _PLACES:
            tags[index] = "JJ"
    return list(zip(words, tags, strict=True))


@cache
def _endings() -> Any:
    from nltk.tag import RegexpTagger

    nouns = f"{_NOUNS_IN_ING} {_NOUNS_IN_ED} {_NOUNS_IN_EST}".replace(" ", "|")
    return RegexpTagger(
        [
            (rf"^(?:{nouns})$", "NN"),
            (r"^['’]s?$", "POS"),
            (r".*[^\W\d_].*ing$", "VBG"),
            (r".*[^\W\d_].*ed$", "VBN"),
            (r".*[^\W\d_].*ly$", "RB"),
            (r".*[^\W\d_].*est$", "JJS"),
            (r"^\d[\d.,/:]*$", "CD"),
            (r".*", "NN"),
        ]
    )


@cache
def _parser() -> Any:
    from nltk import RegexpParser

    return RegexpParser(GRAMMAR)


@cache
def _nltk_tagger() -> Any:
    """NLTK's tagger, or None where its data is not installed."""
    from nltk.tag.perceptron import PerceptronTagger

    try:
        return PerceptronTagger()
    except LookupError:
        return None


def which_tagger(tagger: Tagger = "auto") -> Literal["nltk", "rules"]:
    """What "auto" stands for here. An evaluation that scores by the subject should say so in its report.

    Raises:
        ValueError: if NLTK's tagger is asked for and its data is not installed.
    """
    if tagger not in ("auto", "nltk", "rules"):
        raise ValueError(f"unknown tagger {tagger!r}: use auto, nltk or rules")
    if tagger == "rules":
        return "rules"
    if _nltk_tagger() is not None:
        return "nltk"
    if tagger == "nltk":
        raise ValueError(
            "NLTK's tagger data is not installed: put averaged_perceptron_tagger_eng into a folder of nltk.data.path, "
            'or use tagger="rules"'
        )
    return "rules"


def _words(caption: str) -> list[Span]:
    """The spans of the words and punctuation marks, by NLTK's Treebank tokenizer (code only)."""
    from nltk.tokenize import NLTKWordTokenizer

    spans = []
    for sentence in re.finditer(r"[^.?!\s](?:[^.?!]|[.?!](?=\S))*[.?!]*", caption):
        text = sentence.group().replace('"', " ")  # the tokenizer writes `` for ", its spans would have to be searched
        spans += [(sentence.start() + a, sentence.start() + b) for a, b in NLTKWordTokenizer().span_tokenize(text)]
    return spans


def noun_phrases(caption: str, tagger: Tagger = "auto") -> tuple[Span, ...]:
    """The character spans of the noun phrases, in reading order; the same words twice are two spans.

    >>> caption = "a dog next to a dog and two cats"
    >>> [caption[start:end] for start, end in noun_phrases(caption, "rules")]
    ['a dog', 'a dog', 'cats']
    """
    chosen = which_tagger(tagger)
    spans = _words(caption)
    words = [caption[start:end].lower() for start, end in spans]
    tags = _rule_tags(words) if chosen == "rules" else _nltk_tagger().tag(words)
    leaves = [(index, _settled(word, tag)) for index, (word, tag) in enumerate(tags)]
    if not leaves:
        return ()
    tree = _parser().parse(leaves)
    found = [[index for index, _ in subtree.leaves()] for subtree in tree.subtrees(lambda t: t.label() == "NP")]
    return tuple((spans[indices[0]][0], spans[indices[-1]][1]) for indices in found)


def _settled(word: str, tag: str) -> str:
    """Two corrections to either tagger: a mark without letter or digit is no noun; "the left one" is one thing."""
    if not any(character.isalnum() for character in word):
        return "."
    return "NN" if word in _ONE else tag


def phrase_prompt(caption: str, tagger: Tagger = "auto") -> Prompt:
    """The finished caption with one entry per noun phrase.

    Raises:
        ValueError: if there is no noun phrase.
    """
    spans = noun_phrases(caption, tagger)
    if not spans:
        raise ValueError(f"no noun phrase found in {caption!r}: name the spans, or pass it as categories or referring")
    return Prompt(finish_caption(caption), tuple((span,) for span in spans), tuple(caption[a:b] for a, b in spans))


def subject_span(caption: str, tagger: Tagger = "auto") -> Span | None:
    """The span of what a referring expression is about: its first noun phrase that is not just a place.

    "man in red on the left" -> "man"; "on the left side, a small dog" -> "a small dog". None where there is no such
    phrase, as in "bottom right".
    """
    for start, end in noun_phrases(caption, tagger):
        words = re.findall(r"\w+", caption[start:end].lower())
        if not all(word in _PLACES or _tag_of_word().get(word) == "DT" for word in words):
            return start, end
    return None


def subject_tokens(caption: str, encoded: EncodedCaption, tagger: Tagger = "auto") -> list[int]:
    """The token indices of the subject phrase, or of all words where there is none; for `scoring="subject"`.

    `encoded` is the tokenised caption, finished or not; special tokens are never among the indices.
    """
    span = subject_span(caption, tagger)
    tokens = tokens_of_spans(encoded, [[span]])[0] if span else []
    return tokens or [
        index
        for index, (start, end) in enumerate(encoded.offsets)
        if start < end and any(character.isalnum() for character in caption[start:end])
    ]
