"""What to look for, in four named modes, and how each becomes captions and token sets. Host only, no model.

A mode is a class; nothing is guessed from the shape of a string. Axes: C categories (or phrases), T text tokens.
"""

import logging
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from groundingdino.inference.learned_prompt import SUFFIX, LearnedPrompt, read_learned_prompt
from groundingdino.inference.vocabulary import Vocabulary, split_context
from groundingdino.inputs import noun_phrases, text

logger = logging.getLogger(__name__)

Scoring = Literal["max", "subject", "llmdet"]
SCORINGS: tuple[Scoring, ...] = ("max", "subject", "llmdet")
# Sides, and what in a sentence names them for LLMDet: also as a part of other words, such as "bright".
SIDES = {"left": ("left",), "right": ("right",), "top": ("top", "upper"), "bottom": ("under", "bottom")}


@dataclass(frozen=True)
class Categories:
    """Any number of names, each looked for by itself; label = index in the list, also where two names are equal.

    A single string must separate them by ".", as in "cat . remote control ."; "." and "?" inside a name of a list
    split that name's attention, as in mmdet. A name of a list that ends in ".prompt" is the file of a learned prompt,
    which stands for its name (`learned_prompt`). A list that is too long for one caption is split into several: as many
    names as fit, or at most `names_per_caption` (mmdet's `chunked_size`: 40 in its LVIS figures).
    """

    names: Sequence[str] | str
    names_per_caption: int | None = None


@dataclass(frozen=True)
class Phrases:
    """A caption whose noun phrases are looked for; label = index of the phrase."""

    caption: str


@dataclass(frozen=True)
class Spans:
    """A caption and what to look for in it: per object one or more character spans [start, end)."""

    caption: str
    spans: Sequence[Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Referring:
    """One sentence that describes one object.

    `scoring` "max" takes the best token of the sentence, which is mmdet's protocol and that of its published
    Precision@k; "subject" the mean over the phrase that the sentence is about, so that words for its surroundings do
    not count. "llmdet" is how LLMDet's code reaches its published figures: the mean over its own choice of a phrase
    (see `noun_phrases.llmdet_spans`), then the 30 best boxes ranked anew with up to 0.7 added for each side that the
    sentence names (see `SIDES`). How much of its lead over "max" each of the two gives, nobody has published.
    """

    sentence: str
    scoring: Scoring = "max"


LONGEST_TEXT = 200_000  # characters of a caption, a name, or a string of names

Prompt = Categories | Vocabulary | Phrases | Spans | Referring


@dataclass(frozen=True)
class CaptionChunk:
    """One caption for the detector: a whole prompt, or the part of a category list that fits into one caption."""

    caption: text.EncodedCaption
    positive_map: Tensor | None  # (C, T) bool; None = the best of all tokens
    first_label: int  # of this caption's C
    sides: tuple[str, ...] = ()  # of SIDES: boxes near them are preferred, see `postprocess.side_bonus`
    learned: tuple[tuple[int, LearnedPrompt], ...] = ()  # row of the positive map: whose tokens it marks

    def with_learned(self, features: Tensor, model: str) -> Tensor:
        """The text half's features (T, D) with the rows of learned names replaced; ValueError for another `model`'s."""
        for row, learned in self.learned:
            assert self.positive_map is not None
            places = self.positive_map[row].nonzero()[:, 0].to(features.device)
            if learned.model != model or learned.tokens.shape != (len(places), features.shape[1]):
                raise ValueError(
                    f"the prompt {learned.name!r} was learned with {learned.model}, this model is {model}: learn it "
                    "again with this model"
                )
            features = features.index_put((places,), learned.tokens.to(features))
        return features


@dataclass(frozen=True)
class ResolvedPrompt:
    """A prompt as captions and token sets."""

    chunks: tuple[CaptionChunk, ...]
    names: tuple[str, ...]  # one a label
    spans: tuple[text.Spans, ...] | None  # one a label, in phrase and span mode
    one_object: bool  # whether exactly one object is described
    vocabulary: Vocabulary | None = None  # the captions' labels are its texts, the ranking's its names


def resolve(
    prompt: Prompt, tokenizer: text.CaptionTokenizer, max_tokens: int = text.MAX_TOKENS, *, strict: bool = True
) -> ResolvedPrompt:
    """The prompt's captions and token sets; a category list becomes as many captions as its tokens need.

    Args:
        strict: refuse what cannot be answered in full. False is for evaluation, where every annotation counts: as in
            mmdet a caption that is too long is cut off, and an object without a word in it scores 0.
    Raises:
        ValueError: nothing to look for, a span without a word, or a name or caption that exceeds `max_tokens`.
    """
    if isinstance(prompt, Categories):
        return _resolve_categories(prompt, tokenizer, max_tokens)
    if isinstance(prompt, Vocabulary):
        return _resolve_vocabulary(prompt, tokenizer, max_tokens)
    encode = _Encoder(tokenizer, max_tokens, strict)
    if isinstance(prompt, Phrases):
        return _resolve_spans(noun_phrases.phrase_prompt(encode.checked(prompt.caption)), encode)
    if isinstance(prompt, Spans):
        return _resolve_spans(_span_prompt(prompt, encode), encode)
    if isinstance(prompt, Referring):
        return _resolve_referring(prompt, encode)
    raise ValueError(
        f"a prompt is Categories, Vocabulary, Phrases, Spans or Referring, got {type(prompt).__name__}: {prompt!r}"
    )


@dataclass(frozen=True)
class _Encoder:
    """Caption -> tokens, by the rules of one call of `resolve`."""

    tokenizer: text.CaptionTokenizer
    max_tokens: int
    strict: bool

    def checked(self, caption: str) -> str:
        _check_text(caption, "the caption")
        if self.strict and not caption.strip(" .?"):
            raise ValueError(f"the caption is empty: {caption!r}")
        return caption

    def __call__(self, caption: str) -> text.EncodedCaption:
        encoded = self.tokenizer.encode(caption)
        count = len(encoded.token_ids)
        if count > self.max_tokens and self.strict:
            raise ValueError(
                f"the caption is {count} tokens long, the model reads {self.max_tokens}; shorten it, or pass "
                f"a list of categories, which is split: {caption[:60]!r}..."
            )
        return encoded

    def chunk(self, encoded: text.EncodedCaption, positive_map: Tensor | None) -> CaptionChunk:
        """The only caption of a prompt; `positive_map` is of the whole of it."""
        kept = text.truncate(encoded, self.max_tokens)
        if positive_map is not None:
            positive_map = positive_map[:, : len(kept.token_ids)]
        return CaptionChunk(kept, positive_map, 0)


def _check_text(value: object, what: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{what} is a string, got {type(value).__name__}")
    if len(value) > LONGEST_TEXT:
        raise ValueError(f"{what} is {len(value):,} characters long, at most {LONGEST_TEXT:,} are read")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{what} holds half a surrogate pair, which is no character: {ascii(value[:60])}")


def _names(names: object) -> list[str]:
    """The names of a category list or string, each checked."""
    if isinstance(names, str):
        _check_text(names, "the string of categories")
        return text.split_names(names)
    if not isinstance(names, Iterable) or isinstance(names, bytes | Mapping):
        raise TypeError(f'categories are a list of names or a string "a . b .", got {type(names).__name__}')
    result = list(names)
    for name in result:
        _check_text(name, "a category")
    return result


def _resolve_categories(prompt: Categories, tokenizer: text.CaptionTokenizer, max_tokens: int) -> ResolvedPrompt:
    given = _names(prompt.names)
    learned = {index: read_learned_prompt(name) for index, name in enumerate(given) if name.endswith(SUFFIX)}
    names = [learned[index].name if index in learned else name for index, name in enumerate(given)]
    text.category_prompt(names)  # refuses empty lists and names by themselves, before they are counted
    _warn_of_unreadable(names, tokenizer)
    chunks = []
    for part in text.split_by_tokens(names, tokenizer, max_tokens, prompt.names_per_caption):
        asked = text.category_prompt([names[index] for index in part])
        caption = tokenizer.encode(asked.caption)
        own = tuple((index - part.start, learned[index]) for index in part if index in learned)
        chunks.append(CaptionChunk(caption, text.positive_map(caption, asked.spans), part.start, learned=own))
    return ResolvedPrompt(tuple(chunks), tuple(names), None, one_object=False)


@cache
def _warn_once(name: str, words: tuple[str, ...]) -> None:
    logger.warning(
        "the model reads English: of the prompt %r it knows %s by single letters or not at all; translate it",
        name, ", ".join(map(repr, words)),
    )  # fmt: skip


def _warn_of_unreadable(names: Sequence[str], tokenizer: text.CaptionTokenizer) -> None:
    """Log, once a process, the names that the model cannot read."""
    for name in names:
        words = text.unreadable_words(name, tokenizer)
        if words:
            _warn_once(name, tuple(words))


def _resolve_vocabulary(prompt: Vocabulary, tokenizer: text.CaptionTokenizer, max_tokens: int) -> ResolvedPrompt:
    contexts = [split_context(one) for one in prompt.texts]
    plain = Categories(["".join(parts) for parts in contexts], prompt.names_per_caption)
    resolved = _resolve_categories(plain, tokenizer, max_tokens)
    chunks = []
    for chunk in resolved.chunks:
        assert chunk.positive_map is not None
        labels = range(chunk.first_label, chunk.first_label + len(chunk.positive_map))
        asked = text.category_prompt([resolved.names[label] for label in labels])
        spans = []
        for label, ((start, end),) in zip(labels, asked.spans, strict=True):
            before, inside, behind = contexts[label]
            begin = start + len(text.clean_name(before))
            spans.append(((begin, begin + len(text.clean_name(inside)) if before or behind else end),))
        chunks.append(replace(chunk, positive_map=text.positive_map(chunk.caption, spans)))
    return replace(resolved, chunks=tuple(chunks), names=prompt.shown, vocabulary=prompt)


def _span_prompt(prompt: Spans, encode: _Encoder) -> text.Prompt:
    caption = encode.checked(prompt.caption)
    if not isinstance(prompt.spans, Sequence) or not prompt.spans:
        raise ValueError("no spans: give one list of [start, end) per object")
    for pieces in prompt.spans:
        if not isinstance(pieces, Sequence) or not all(_is_span(piece) for piece in pieces):
            raise ValueError("an object's spans are a list of [start, end), two whole numbers each")
        for start, end in pieces:
            if not 0 <= start < end <= len(caption):
                raise ValueError(f"span [{start}, {end}) is not inside {caption!r} ({len(caption)} characters)")
    spans = tuple(tuple((int(start), int(end)) for start, end in pieces) for pieces in prompt.spans)
    names = tuple(" / ".join(caption[start:end] for start, end in pieces) for pieces in spans)
    return text.Prompt(text.finish_caption(caption), spans, names)


def _is_span(piece: object) -> bool:
    return isinstance(piece, Sequence) and len(piece) == 2 and all(isinstance(side, Integral) for side in piece)


def _resolve_spans(asked: text.Prompt, encode: _Encoder) -> ResolvedPrompt:
    caption = encode(asked.caption)
    tokens = text.positive_map(caption, asked.spans)
    for name, spans, row in zip(asked.names, asked.spans, tokens, strict=True):
        if encode.strict and not row.any():
            raise ValueError(f"spans {list(spans)} ({name!r}) of {asked.caption!r} hold no word")
    return ResolvedPrompt((encode.chunk(caption, tokens),), asked.names, asked.spans, one_object=False)


def _resolve_referring(prompt: Referring, encode: _Encoder) -> ResolvedPrompt:
    if prompt.scoring not in SCORINGS:
        raise ValueError(f"unknown scoring {reprlib.repr(prompt.scoring)}: use one of {', '.join(SCORINGS)}")
    sentence = text.finish_caption(encode.checked(prompt.sentence))
    caption = encode(sentence)
    if prompt.scoring == "llmdet":
        occurrences = text.positive_map(caption, [[span] for span in noun_phrases.llmdet_spans(sentence)])
        sides = tuple(side for side, words in SIDES.items() if any(word in prompt.sentence for word in words))
        chunk = replace(encode.chunk(caption, occurrences), sides=sides)
        return ResolvedPrompt((chunk,), (prompt.sentence,) * len(occurrences), None, one_object=True)
    tokens = subject_map(sentence, caption) if prompt.scoring == "subject" else None
    if tokens is not None and not tokens[:, : encode.max_tokens].any():
        tokens = None  # no word of the subject in reach: the best token counts
    return ResolvedPrompt((encode.chunk(caption, tokens),), (prompt.sentence,), None, one_object=True)


def subject_map(caption: str, encoded: text.EncodedCaption) -> Tensor:
    """(1, T) bool, True at the tokens of the phrase that a sentence is about."""
    result = torch.zeros(1, len(encoded.token_ids), dtype=torch.bool)
    result[0, noun_phrases.subject_tokens(caption, encoded)] = True
    return result
