"""Captions for training: what mmdet's `RandomSamplingNegPos` makes of an entry, and words that follow a flip.

Source: mmdet `datasets/transforms/text_transformers.py`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from groundingdino.inputs import text
from groundingdino.inputs.text import CaptionTokenizer, Spans

NUM_NEGATIVES = 85  # most categories drawn that are not in the image
ALL_NEGATIVES_PROBABILITY = 0.5  # of drawing that many; otherwise 1 to that many, uniformly

_SIDES = re.compile(r"\b(left|right)(?=(?:est|ests|er|most|ward|wards|hand|handed|side|y|ie)?\b)", re.IGNORECASE)


def grounding_caption(caption: str, spans: Sequence[Spans]) -> tuple[str, tuple[Spans, ...]]:
    """Lower case, stripped, with a final ". ", and the spans of the result.

    mmdet strips without moving the spans; here they move along. Lower case changes no token (the tokenizer is uncased),
    so a caption whose length it would change ("İ") stays as it is.
    """
    lowered = caption.lower()
    lowered = lowered if len(lowered) == len(caption) else caption
    shift = len(lowered) - len(lowered.lstrip())
    stripped = lowered.strip()
    moved = tuple(
        tuple((max(start - shift, 0), min(end - shift, len(stripped))) for start, end in pieces) for pieces in spans
    )
    kept = tuple(tuple((start, end) for start, end in pieces if end > start) for pieces in moved)
    return text.finish_caption(stripped), kept


def swap_sides(caption: str, spans: Sequence[Spans]) -> tuple[str, tuple[Spans, ...]]:
    """The caption of the mirrored image: left <-> right, also in leftmost, right-hand, ..., with the spans moved along.

    Every "right" is taken as a side, also in "right behind". Upper case is kept.
    """
    position = list(range(len(caption) + 1))  # of each old character in the new caption
    pieces, end, shift = [], 0, 0
    for match in _SIDES.finditer(caption):
        old = match.group(1)
        new = "right" if old.lower() == "left" else "left"
        new = new.upper() if old.isupper() else new.capitalize() if old[0].isupper() else new
        pieces += [caption[end : match.start()], new]
        for inside in range(match.start() + 1, match.end()):
            position[inside] = match.start() + shift + min(inside - match.start(), len(new))
        end, shift = match.end(), shift + len(new) - len(old)
        for after in range(match.end(), len(position)):
            position[after] = after + shift
    swapped = "".join([*pieces, caption[end:]])
    return swapped, tuple(tuple((position[start], position[stop]) for start, stop in piece) for piece in spans)


@dataclass(frozen=True)
class CategoryDraw:
    """A prompt of the image's categories and some others, in random order."""

    caption: str
    places: Mapping[int, int]  # category number in the image -> its place in the prompt
    spans: tuple[Spans, ...]  # of each place


def draw_categories(
    present: Sequence[int],
    label_map: Mapping[int, str],
    tokenizer: CaptionTokenizer,
    generator: np.random.Generator,
    max_tokens: int = text.MAX_TOKENS,
) -> CategoryDraw:
    """All categories of the image, then others at random, as long as the prompt has room for them.

    Differs from mmdet where it errs: the draw among "a/b" names is not written back into the label map; a category of
    the image is never among the negatives too; [CLS] and [SEP] count, so nothing is cut off. Of an image with too many
    categories a random part is kept.
    """
    names = {}
    room = max_tokens - 2
    positives = generator.permutation(np.unique(np.asarray(present, dtype=np.int64))).tolist()
    total = min(NUM_NEGATIVES, len(label_map))
    if total and generator.random() >= ALL_NEGATIVES_PROBABILITY:
        total = int(generator.integers(total)) + 1
    others = generator.choice(np.fromiter(label_map, np.int64), size=total, replace=False).tolist()
    wanted = positives + [label for label in others if label not in positives]
    for place, label in enumerate(wanted):
        name = _draw_name(label_map[label], generator)
        cost = len(tokenizer.encode(name).token_ids) - 1  # its tokens and "."
        if cost == 1:
            continue
        if cost > room:
            if place < len(positives):
                continue  # a shorter one may fit
            break
        names[label] = name
        room -= cost
    order = generator.permutation(np.fromiter(names, np.int64)).tolist()
    caption, spans = "", []
    for label in order:
        spans.append(((len(caption), len(caption) + len(names[label])),))
        caption += names[label] + ". "
    return CategoryDraw(caption, {label: n for n, label in enumerate(order) if label in positives}, tuple(spans))


def _draw_name(name: str, generator: np.random.Generator) -> str:
    """One of the names of "a/b" (Objects365), cleaned, in lower case."""
    alternatives = name.split("/")
    if len(alternatives) > 1:
        name = alternatives[int(generator.integers(len(alternatives)))].strip()
    return text.clean_name(name).lower()
