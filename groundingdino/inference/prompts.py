"""What to look for, in four named modes, and how each becomes captions and token sets. Host only, no model.

A mode is a class; nothing is guessed from the shape of a string. Axes: C categories (or phrases), T text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from groundingdino.inputs import noun_phrases, text

Scoring = Literal["max", "subject"]
SCORINGS: tuple[Scoring, ...] = ("max", "subject")


@dataclass(frozen=True)
class Categories:
    """Any number of names, each looked for by itself; label = index in the list, also where two names are equal.

    A single string must separate them by ".", as in "cat . remote control ."; "." and "?" inside a name of a list
    split that name's attention, as in mmdet.
    """

    names: Sequence[str] | str


@dataclass(frozen=True)
class Phrases:
    """A caption whose noun phrases are looked for; label = index of the phrase. `tagger`: see `phrases`."""

    caption: str
    tagger: noun_phrases.Tagger = "auto"


@dataclass(frozen=True)
class Spans:
    """A caption and what to look for in it: per object one or more character spans [start, end)."""

    caption: str
    spans: Sequence[Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Referring:
    """One sentence that describes one object.

    `scoring` "max" takes the best token of the sentence, which is mmdet's protocol and that of its published
    Precision@k; "subject" the mean over the phrase that the sentence is about (LLMDet's observation: the same weights
    find the described object more often, as words for its surroundings no longer count).
    """

    sentence: str
    scoring: Scoring = "max"


Prompt = Categories | Phrases | Spans | Referring


@dataclass(frozen=True)
class Piece:
    """One caption for the detector: a whole prompt, or the part of a category list that fits into one caption."""

    caption: text.EncodedCaption
    positive_map: Tensor | None  # (C, T) bool; None = the best of all tokens
    first_label: int  # of this piece's C


@dataclass(frozen=True)
class ResolvedPrompt:
    """A prompt as captions and token sets."""

    pieces: tuple[Piece, ...]
    names: tuple[str, ...]  # one a label
    spans: tuple[text.Spans, ...] | None  # one a label, in phrase and span mode
    one_object: bool  # whether exactly one object is described


def resolve(prompt: Prompt, tokenizer: text.CaptionTokenizer, max_tokens: int = text.MAX_TOKENS) -> ResolvedPrompt:
    """Tokenise a prompt; a category list is split into as many captions as its tokens need.

    Raises:
        ValueError: nothing to look for, a span without a word, or a name or caption that exceeds `max_tokens`.
    """
    if isinstance(prompt, Categories):
        return _resolve_categories(prompt, tokenizer, max_tokens)
    if isinstance(prompt, Phrases):
        found = noun_phrases.phrase_prompt(_checked(prompt.caption), prompt.tagger)
        return _resolve_spans(found, tokenizer, max_tokens)
    if isinstance(prompt, Spans):
        return _resolve_spans(_span_prompt(prompt), tokenizer, max_tokens)
    if isinstance(prompt, Referring):
        return _resolve_referring(prompt, tokenizer, max_tokens)
    raise ValueError(f"a prompt is Categories, Phrases, Spans or Referring, got {type(prompt).__name__}: {prompt!r}")


def _resolve_categories(prompt: Categories, tokenizer: text.CaptionTokenizer, max_tokens: int) -> ResolvedPrompt:
    names = text.split_names(prompt.names) if isinstance(prompt.names, str) else list(prompt.names)
    text.category_prompt(names)  # refuses empty lists and names by themselves, before they are counted
    pieces = []
    for part in text.split_by_tokens(names, tokenizer, max_tokens):
        asked = text.category_prompt([names[index] for index in part])
        caption = tokenizer.encode(asked.caption)
        pieces.append(Piece(caption, text.positive_map(caption, asked.spans, len(caption.token_ids)), part.start))
    return ResolvedPrompt(tuple(pieces), tuple(names), None, one_object=False)


def _span_prompt(prompt: Spans) -> text.Prompt:
    caption = _checked(prompt.caption)
    if not prompt.spans:
        raise ValueError("no spans: give one list of [start, end) per object")
    for pieces in prompt.spans:
        for start, end in pieces:
            if not 0 <= start < end <= len(caption):
                raise ValueError(f"span [{start}, {end}) is not inside {caption!r} ({len(caption)} characters)")
    spans = tuple(tuple((int(start), int(end)) for start, end in pieces) for pieces in prompt.spans)
    names = tuple(" / ".join(caption[start:end] for start, end in pieces) for pieces in spans)
    return text.Prompt(text.finish_caption(caption), spans, names)


def _resolve_spans(asked: text.Prompt, tokenizer: text.CaptionTokenizer, max_tokens: int) -> ResolvedPrompt:
    caption = _encoded(asked.caption, tokenizer, max_tokens)
    tokens = text.positive_map(caption, asked.spans, len(caption.token_ids))
    for name, spans, row in zip(asked.names, asked.spans, tokens, strict=True):
        if not row.any():
            raise ValueError(f"spans {list(spans)} ({name!r}) of {asked.caption!r} hold no word")
    return ResolvedPrompt((Piece(caption, tokens, 0),), asked.names, asked.spans, one_object=False)


def _resolve_referring(prompt: Referring, tokenizer: text.CaptionTokenizer, max_tokens: int) -> ResolvedPrompt:
    if prompt.scoring not in SCORINGS:
        raise ValueError(f"unknown scoring {prompt.scoring!r}: use one of {', '.join(SCORINGS)}")
    sentence = text.finish_caption(_checked(prompt.sentence))
    caption = _encoded(sentence, tokenizer, max_tokens)
    tokens = None
    if prompt.scoring == "subject":
        tokens = subject_map(sentence, caption, len(caption.token_ids))
    return ResolvedPrompt((Piece(caption, tokens, 0),), (prompt.sentence,), None, one_object=True)


def subject_map(caption: str, encoded: text.EncodedCaption, num_tokens: int) -> Tensor:
    """(1, num_tokens) bool, True at the tokens of the phrase that a sentence is about; for `category_scores`."""
    result = text.positive_map(encoded, [], num_tokens).new_zeros(1, num_tokens)
    result[0, [token for token in noun_phrases.subject_tokens(caption, encoded) if token < num_tokens]] = True
    return result


def _checked(caption: str) -> str:
    if not isinstance(caption, str) or not caption.strip(" .?"):
        raise ValueError(f"the caption is empty: {caption!r}")
    return caption


def _encoded(caption: str, tokenizer: text.CaptionTokenizer, max_tokens: int) -> text.EncodedCaption:
    encoded = tokenizer.encode(caption)
    if len(encoded.token_ids) > max_tokens:
        raise ValueError(
            f"the caption is {len(encoded.token_ids)} tokens long, the model reads {max_tokens}; shorten it, or pass "
            f"a list of categories, which is split: {caption[:60]!r}..."
        )
    return encoded
