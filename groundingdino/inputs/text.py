"""Captions, category lists and character spans -> token ids, sub-sentence attention, positions, token sets.

Everything here runs on the host and needs no model. The ids are those of bert-base-uncased (its vocabulary is part
of the package), the masks those of mmdet `models/language_models/bert.py`, the token sets those of mmdet
`models/detectors/glip.py::create_positive_map`.

Axes: B captions, T text tokens, N objects.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from torch import Tensor

from groundingdino.structures import TextBatch

VOCABULARY_FILE = Path(__file__).parent / "assets" / "bert-base-uncased-vocab.txt"
MAX_TOKENS = 256  # the released models' limit, [CLS] and [SEP] included

PAD_ID, UNKNOWN_ID, CLS_ID, SEP_ID = 0, 100, 101, 102
SEPARATORS = {"[CLS]": CLS_ID, "[SEP]": SEP_ID, ".": 1012, "?": 1029}  # each ends a sub-sentence

Span = tuple[int, int]  # characters [start, end)
Spans = tuple[Span, ...]  # what names one object; may be in pieces


@dataclass(frozen=True)
class EncodedCaption:
    """One tokenised caption."""

    token_ids: tuple[int, ...]  # [CLS] ... [SEP]
    offsets: tuple[Span, ...]  # the characters of each token; (0, 0) for [CLS] and [SEP]


@dataclass(frozen=True)
class Prompt:
    """A caption and what to look for in it."""

    caption: str
    spans: tuple[Spans, ...]  # one entry per object or category
    names: tuple[str, ...]  # one per entry of `spans`, cleaned


class CaptionTokenizer:
    """bert-base-uncased's tokenizer on the `tokenizers` library; equal to `transformers.BertTokenizerFast`.

    Picklable, offline and without `transformers`.

    Args:
        vocab_file: one token a line; default is the vocabulary in the package.
    Raises:
        ValueError: if the vocabulary is not bert-base-uncased's where it matters (the separators' ids).
    """

    def __init__(self, vocab_file: Path | None = None):
        path = vocab_file or VOCABULARY_FILE
        tokenizer = Tokenizer(WordPiece.from_file(str(path), unk_token="[UNK]", max_input_chars_per_word=100))
        expected = {"[PAD]": PAD_ID, **SEPARATORS}
        found = {token: tokenizer.token_to_id(token) for token in expected}
        if found != expected:
            raise ValueError(f"{path} is not the bert-base-uncased vocabulary: expected ids {expected}, found {found}")
        tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
        tokenizer.normalizer = BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = BertPreTokenizer()
        tokenizer.post_processor = BertProcessing(("[SEP]", SEP_ID), ("[CLS]", CLS_ID))  # by place: 0.23 renamed them
        tokenizer.decoder = WordPieceDecoder()
        self._tokenizer = tokenizer

    def encode(self, caption: str) -> EncodedCaption:
        """Token ids and character offsets of the whole caption."""
        encoding = self._tokenizer.encode(caption)
        return EncodedCaption(tuple(encoding.ids), tuple(encoding.offsets))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The words of token ids, without [CLS], [SEP] and padding; pieces of a word are joined."""
        return self._tokenizer.decode(list(token_ids))

    def save(self, path: Path) -> None:
        """Write it as a tokenizer.json, which the `tokenizers` library of any language reads."""
        self._tokenizer.save(str(path))


@cache
def default_tokenizer() -> CaptionTokenizer:
    """The packaged tokenizer, built once a process."""
    return CaptionTokenizer()


def unreadable_words(name: str, tokenizer: CaptionTokenizer) -> list[str]:
    """The words of a name that the vocabulary has no piece of, or single letters alone, as of another language."""
    encoded = tokenizer.encode(name)
    tokens = list(zip(encoded.token_ids, encoded.offsets, strict=True))[1:-1]
    words = []
    for word in re.finditer(r"\S+", name):
        inside = [(token, name[start:end]) for token, (start, end) in tokens if word.start() <= start < word.end()]
        letters = [piece for _, piece in inside if piece.isalpha()]
        alone = len(letters) > 1 or not word[0].isascii()
        if any(token == UNKNOWN_ID for token, _ in inside) or (letters and alone and max(map(len, letters)) == 1):
            words.append(word[0])
    return words


def finish_caption(caption: str) -> str:
    """The caption with a final ". " unless it ends in "." already, as mmdet does.

    Without a final separator a caption's last words would be masked differently alone and in a padded batch.
    """
    return caption if caption.endswith(".") else caption + ". "


def clean_name(name: str) -> str:
    """A category name as mmdet prompts it: "(...)" removed, "_" to " ", double spaces to one."""
    return re.sub(r"  ", " ", re.sub(r"\(.*\)", "", name).replace("_", " "))


def category_prompt(names: Sequence[str]) -> Prompt:
    """mmdet's prompt for a list of categories, "a. b. c. ", with the span of each name.

    Names that become equal by cleaning (LVIS has "bow (weapon)" and "bow (decorative ribbons)") stay apart by index.

    Raises:
        ValueError: if the list is empty, or nothing is left of a name.
    """
    if isinstance(names, str):
        raise ValueError(f'categories must be a list of names, got the string {names!r}; "a . b" strings: split_names')
    if not names:
        raise ValueError("no categories: give at least one name")
    cleaned = tuple(clean_name(name) for name in names)
    for name, clean in zip(names, cleaned, strict=True):
        if not clean.strip():
            raise ValueError(f"category {name!r} is empty once cleaned (text in parentheses is removed); rename it")
    caption, spans = "", []
    for name in cleaned:
        spans.append(((len(caption), len(caption) + len(name)),))
        caption += name + ". "
    return Prompt(caption, tuple(spans), cleaned)


def split_names(text: str) -> list[str]:
    """The names in an "a . b ." string: split at ".", stripped, empty ones left out. ValueError if there is none."""
    names = [name.strip() for name in text.split(".") if name.strip()]
    if not names:
        raise ValueError(f'no category in {text!r}: write names separated by ".", such as "cat . dog ."')
    return names


def split_by_tokens(
    names: Sequence[str], tokenizer: CaptionTokenizer, max_tokens: int = MAX_TOKENS, most: int | None = None
) -> list[range]:
    """Consecutive index ranges of `names` whose `category_prompt` each fits into `max_tokens`, `most` names in each.

    A name costs its own tokens and one ".", a prompt [CLS] and [SEP].

    Raises:
        ValueError: naming a category that does not fit alone, or that holds no token at all.
    """
    if most is not None and most < 1:
        raise ValueError(f"{most} names in a caption: at least 1")
    budget = max_tokens - 2
    starts, used = [0], 0
    for index, name in enumerate(names):
        own = len(tokenizer.encode(clean_name(name)).token_ids) - 2
        if own == 0:
            raise ValueError(f"category {name!r} holds no token; rename it")
        if own + 1 > budget:
            raise ValueError(f"category {name!r} is {own} tokens long; a prompt holds {budget - 1}. Shorten the name")
        if used + own + 1 > budget or index - starts[-1] == most:
            starts.append(index)
            used = 0
        used += own + 1
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(names)], strict=True)]


def tokens_of_spans(encoded: EncodedCaption, spans: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """The token indices that each list of character spans covers, ascending; mmdet `create_positive_map`.

    A span that begins or ends on characters without a token (a space) is narrowed by up to two characters at that
    side and dropped if that does not help. Indices refer to the untruncated caption.

    Raises:
        ValueError: if a span begins before the caption.
    """
    token_at: dict[int, int] = {}  # character -> first token that covers it
    for token, (start, end) in reversed(list(enumerate(encoded.offsets))):
        token_at.update(dict.fromkeys(range(start, end), token))

    def first_token(characters: Sequence[int]) -> int | None:
        return next((token_at[character] for character in characters if character in token_at), None)

    sets = []
    for pieces in spans:
        tokens: set[int] = set()
        for start, end in pieces:
            if start < 0 or end < 1:
                raise ValueError(f"span [{start}, {end}) begins before the caption; characters count from 0")
            first = first_token((start, start + 1, start + 2))
            last = first_token((end - 1, end - 2, end - 3))
            if first is not None and last is not None:
                tokens.update(range(first, last + 1))
        sets.append(sorted(tokens))
    return sets


def positive_map(
    encoded: EncodedCaption, spans: Sequence[Sequence[Sequence[int]]], num_tokens: int | None = None
) -> Tensor:
    """(N, num_tokens) bool, True where a token names the object; tokens past `num_tokens` are left out.

    num_tokens: default is the caption's length.
    """
    num_tokens = len(encoded.token_ids) if num_tokens is None else num_tokens
    result = torch.zeros(len(spans), num_tokens, dtype=torch.bool)
    for row, tokens in zip(result, tokens_of_spans(encoded, spans), strict=True):
        row[[token for token in tokens if token < num_tokens]] = True
    return result


def truncate(encoded: EncodedCaption, max_tokens: int) -> EncodedCaption:
    """The caption with its first tokens and [SEP], `max_tokens` in all; itself where it is no longer, as in mmdet."""
    if len(encoded.token_ids) <= max_tokens:
        return encoded
    ids, offsets = encoded.token_ids, encoded.offsets
    return EncodedCaption((*ids[: max_tokens - 1], ids[-1]), (*offsets[: max_tokens - 1], offsets[-1]))


def collate_text(encoded: Sequence[EncodedCaption], max_tokens: int = MAX_TOKENS, multiple: int = 1) -> TextBatch:
    """Captions as one batch on the CPU, padded on the right to the longest, truncated to `max_tokens` as mmdet does.

    The predictor never lets a caption be truncated; training may. The length is rounded up to a multiple of `multiple`,
    within `max_tokens`.
    """
    rows = [truncate(caption, max_tokens).token_ids for caption in encoded]
    T = max(len(row) for row in rows)
    T = max(T, min(-(-T // multiple) * multiple, max_tokens))
    token_ids = torch.tensor([row + (PAD_ID,) * (T - len(row)) for row in rows])  # (B, T)
    lengths = torch.tensor([len(row) for row in rows])
    attends, position_ids = sub_sentences(token_ids)
    return TextBatch(token_ids, position_ids, attends, valid=torch.arange(T) < lengths[:, None])


def sub_sentences(token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) ids -> `attends` (B, T, T) bool and `position_ids` (B, T).

    A sub-sentence is what lies between two separators, with its closing one. Its tokens see each other, and their
    positions count from 0. Every other token sees itself alone, at position 0: [CLS], padding, and what no separator
    before the last column closes (so [SEP] closes a sub-sentence in a padded row only; see `finish_caption`).
    mmdet `generate_masks_with_special_tokens_and_transfer_map`, without its loops.
    """
    T = token_ids.shape[1]
    column = torch.arange(T, device=token_ids.device).expand_as(token_ids)
    separator = torch.isin(token_ids, torch.tensor(list(SEPARATORS.values()), device=token_ids.device))
    closing = torch.where(separator, column, T).flip(1).cummin(1).values.flip(1)  # the next separator's column, or T
    opening = torch.where(separator, column, -1).cummax(1).values  # the last separator's column so far
    opening = torch.cat([torch.full_like(opening[:, :1], -1), opening[:, :-1]], dim=1)  # before this token
    closed = (closing > 0) & (closing < T - 1)
    together = (closing[:, :, None] == closing[:, None, :]) & closed[:, :, None]
    attends = together | torch.eye(T, dtype=torch.bool, device=token_ids.device)
    return attends, torch.where(closed, column - opening - 1, 0)
