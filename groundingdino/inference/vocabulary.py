"""What to look for, by name: its prompts, negatives and threshold, from a file or one of the packaged lists.

    vocabulary = read_vocabulary("names.yaml")  # or names.txt, coco, lvis, objects365, v3det, odinw/pothole
    found = predictor.predict("photo.jpg", vocabulary)

names.txt has a name a line. names.yaml is a list, in which an entry is a name, or a name with more,
or an object, in which a name has its prompts (RBC: red blood cell). A list:

    - bicycle
    - name: forklift
      prompts: [forklift, fork lift truck]
      negatives: [pallet jack]
      threshold: 0.35

The model reads the prompts and the negatives as one list of categories; `postprocess.fold` makes names of them. The
prompts of a name are an ensemble: its score for an object is that of the best of them. A negative is never reported: it
takes away the boxes of its name that it fits better. Words in brackets are what is looked for, the others their
context: "there is a [package] on the porch".
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from groundingdino.data.formats import coco_categories
from groundingdino.data.formats.files import is_file, read_text, read_yaml
from groundingdino.inference.learned_prompt import SUFFIX, read_learned_prompt
from groundingdino.inputs.text import clean_name

FOLDER = Path(__file__).parent / "vocabularies"
LVIS_NAMES_PER_CAPTION = 40  # of mmdet's published figures
PACKAGED = ("coco", "lvis", "objects365", "v3det", "odinw/NAME")
BRACKETS = re.compile(r"([^\[\]]*)\[([^\[\]]+)\]([^\[\]]*)")


class Name(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing to look for."""

    name: str  # as it is shown and written
    prompts: tuple[str, ...] = ()  # what the model reads; none: the name itself
    negatives: tuple[str, ...] = ()  # what only suppresses
    threshold: float | None = None  # least score; None: that of the caller

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts."""
        return self.prompts or (self.name,)


@dataclass(frozen=True)
class PromptRoles:
    """What each text of a vocabulary stands for."""

    owners: tuple[int, ...]  # for each text, the name whose prompt it is; -1: only a negative
    ensembles: tuple[int, ...]  # names with several prompts
    rivals: tuple[tuple[int, tuple[int, ...]], ...]  # (name, the texts that are its negatives)


@dataclass(frozen=True)
class Vocabulary:
    """Names to look for together; a prompt for `Predictor.predict`. Label = index of the name.

    Raises:
        ValueError: names or prompts that are empty or occur twice, a threshold outside [0, 1], unpaired brackets.
    """

    names: tuple[Name, ...]
    names_per_caption: int | None = None  # see `prompts.Categories`

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("no names: give at least one")
        owners: dict[str, str] = {}
        shown: set[str] = set()
        for one in self.names:
            _check(one)
            if one.name in shown:
                raise ValueError(f"the name {one.name!r} occurs twice")
            shown.add(one.name)
            for text in one.texts:
                if text in owners:
                    raise ValueError(f"the prompt {text!r} belongs to {owners[text]!r} and {one.name!r}: keep it once")
                owners[text] = one.name

    @cached_property
    def shown(self) -> tuple[str, ...]:
        """The names alone."""
        return tuple(one.name for one in self.names)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Everything that the model reads, each text once: the prompts and then the negatives of name after name."""
        return tuple(dict.fromkeys(text for one in self.names for text in (*one.texts, *one.negatives)))

    @cached_property
    def thresholds(self) -> tuple[float | None, ...]:
        """Of each name."""
        return tuple(one.threshold for one in self.names)

    @cached_property
    def roles(self) -> PromptRoles:
        """What each of `texts` stands for."""
        place = {text: index for index, text in enumerate(self.texts)}
        owners = [-1] * len(place)
        for index, one in enumerate(self.names):
            for text in one.texts:
                owners[place[text]] = index
        return PromptRoles(
            tuple(owners),
            tuple(index for index, one in enumerate(self.names) if len(one.texts) > 1),
            tuple(
                (i, tuple(place[text] for text in one.negatives)) for i, one in enumerate(self.names) if one.negatives
            ),
        )

    def select(self, names: Iterable[str]) -> "Vocabulary":
        """These names in this order, with their prompts; one that is not in the vocabulary is its own prompt."""
        known = {one.name: one for one in self.names}
        return Vocabulary(tuple(known.get(name) or Name(name) for name in names), self.names_per_caption)


def plain_names(names: Iterable[str]) -> Vocabulary:
    """Names that are their own prompts."""
    return Vocabulary(tuple(_called(Name(name)) for name in names))


def read_vocabulary(given: str | Path) -> Vocabulary:
    """Of a .yaml or .txt file, or of the name of a packaged list.

    Raises:
        ValueError: one line that names the file, the entry and what is wrong with it.
    """
    path = Path(given)
    if not is_file(path):
        return _packaged(str(given))
    try:
        if path.suffix.lower() in (".yaml", ".yml"):
            return Vocabulary(_entries(read_yaml(path)))
        return _lines(path)
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error


def split_context(prompt: str) -> tuple[str, str, str]:
    """What stands before, in and behind the brackets of a prompt; without brackets ("", prompt, "").

    ValueError for brackets that are not one pair.
    """
    if "[" not in prompt and "]" not in prompt:
        return "", prompt, ""
    found = BRACKETS.fullmatch(prompt)
    if found is None:
        raise ValueError(f"prompt {prompt!r}: one pair of brackets marks what is looked for")
    before, inside, behind = found.groups()
    return before, inside, behind


def _packaged(name: str) -> Vocabulary:
    if name == "coco":
        return plain_names(coco_categories.NAMES)
    if name in ("objects365", "v3det"):
        return _lines(FOLDER / f"{name}.txt")
    if name == "lvis":
        return Vocabulary(_lines(FOLDER / "lvis.txt").names, LVIS_NAMES_PER_CAPTION)
    if name.startswith("odinw/"):
        suite = read_yaml(FOLDER / "odinw.yaml")
        if (data_set := name.removeprefix("odinw/")) in suite:
            return Vocabulary(_entries(suite[data_set]))
        raise ValueError(f"no ODinW data set {data_set!r}: use one of {', '.join(suite)}")
    raise ValueError(f"{name}: no such file, nor a packaged list of names ({', '.join(PACKAGED)})")


def _lines(path: Path) -> Vocabulary:
    return plain_names(line.strip() for line in read_text(path).splitlines() if line.strip())


def _entries(document: Any) -> tuple[Name, ...]:
    if isinstance(document, dict) and set(document) == {"names"}:
        document = document["names"]
    if isinstance(document, dict) and not all(isinstance(prompts, dict) for prompts in document.values()):
        texts = {name: prompts if isinstance(prompts, list) else [prompts] for name, prompts in document.items()}
        document = [{"name": name, "prompts": prompts} for name, prompts in texts.items()]
    if not isinstance(document, list):
        raise ValueError(f"expected a list of names, got {type(document).__name__}")
    return tuple(_entry(number, entry) for number, entry in enumerate(document, start=1))


def _entry(number: int, entry: Any) -> Name:
    try:
        fields = entry if isinstance(entry, dict) else {"name": entry}
        texts = {key: value if key == "threshold" else _text(value) for key, value in fields.items()}
        return _called(msgspec.convert(texts, Name))
    except (ValueError, TypeError) as error:
        raise ValueError(f"entry {number}: {error}") from error


def _called(one: Name) -> Name:
    """The name; where a learned prompt's file stands in its place, the one that the file holds."""
    if one.prompts or not one.name.endswith(SUFFIX):
        return one
    return msgspec.structs.replace(one, name=read_learned_prompt(one.name).name, prompts=(one.name,))


def _text(value: Any) -> Any:
    """What YAML takes for a number or a truth value (6, no, null) is refused or read as the text that it was."""
    if isinstance(value, list):
        return [_text(one) for one in value]
    if value is None or isinstance(value, bool):
        raise ValueError(f'YAML reads one of its words as {value}: put it in quotes, as in "no" or "null"')
    return str(value) if isinstance(value, int) else value


def _check(one: Name) -> None:
    for text in (one.name, *one.prompts, *one.negatives):
        if not clean_name("".join(split_context(text))).strip(" .?"):
            raise ValueError(f"{text!r} of {one.name!r} is empty (text in parentheses is not read)")
    if one.threshold is not None and not 0 <= one.threshold <= 1:
        raise ValueError(f"threshold {one.threshold} of {one.name!r} is not in [0, 1]")
    both = set(one.texts) & set(one.negatives)
    if both:
        raise ValueError(f"{min(both)!r} is a prompt of {one.name!r} and its negative")
