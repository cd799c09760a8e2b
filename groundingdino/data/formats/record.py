"""What every annotation format is read into: one annotated image, its objects, its place in the file, its problems.

Boxes are (x1, y1, x2, y2) in pixels of the upright image. The checks that every format shares are made here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import msgspec

from groundingdino.inputs.text import Spans
from groundingdino.runtime.messages import printable

Box = tuple[float, float, float, float]  # x1, y1, x2, y2

MOST_SHOWN = 400  # characters of a message, which may quote anything
MOST_CHARACTERS = 100_000  # of a caption; models read some hundred words
MOST_PATH, MOST_NAME = 4095, 255  # bytes of a path, and of a name in it, that file systems take

MIN_SIDE = 1.0  # pixels; mmdet leaves thinner boxes out
ROUNDING = 1e-6  # pixels; what x + width - x may lose
LARGEST = 1e7  # pixels; nothing larger is a picture's side or a box's coordinate

CROWD, DIFFICULT, TRUNCATED, OCCLUDED, DEPICTION, INSIDE = FLAGS = (
    "crowd",  # the box holds many (COCO iscrowd, OpenImages IsGroupOf)
    "difficult",  # not counted in evaluation (VOC difficult, COCO ignore)
    "truncated",
    "occluded",
    "depiction",  # a drawing of the thing (OpenImages)
    "inside",  # seen from inside (OpenImages)
)
NO_FLAGS: frozenset[str] = frozenset()


class Kind(StrEnum):
    """Kinds of problems, in the order in which they are reported."""

    MALFORMED = "malformed entry"
    FILE_NAME = "file name leaves the image folder"
    MISSING_IMAGE = "image missing"
    BROKEN_IMAGE = "image broken"
    IMAGE_SIZE = "wrong image size"
    ROTATED = "boxes drawn on the image before its EXIF rotation"
    BOX_OUTSIDE = "box outside the image"
    BOX_PAST_EDGE = "box past the image's edge"
    BOX_AREA = "box without area"
    UNKNOWN_CATEGORY = "unknown category"
    CATEGORY_NAME = "category name without a token"
    SAME_NAME = "categories with one name"
    UNNAMED = "caption or phrase that names nothing"
    SPAN = "span outside the caption"
    SPAN_OFF = "span cuts a word"
    LONG_CAPTION = "caption over the token limit"
    DUPLICATE_ID = "duplicate id"
    DUPLICATE_IMAGE = "duplicate image"
    LEAK = "image in two splits"
    NUMBERS = "unusual numbers"
    NO_OBJECTS = "no annotation"
    # What follows may be meant so.
    EMPTY_IMAGE = "image without boxes"
    UNUSED_CATEGORY = "unused category"
    MANY_OBJECTS = "more objects than queries"
    LONG_PROMPT = "categories fill several prompts"
    EXIF = "image rotated by EXIF"
    NOT_A_BOX = "shape that is no box"
    LEFT_OUT = "box that the format does not hold"


NOTES = frozenset(
    (
        Kind.EMPTY_IMAGE,
        Kind.UNUSED_CATEGORY,
        Kind.MANY_OBJECTS,
        Kind.LONG_PROMPT,
        Kind.EXIF,
        Kind.NOT_A_BOX,
        Kind.LEFT_OUT,
    )
)  # reported, but no reason to fail


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong, in one line with file and line."""

    kind: Kind
    where: str  # file and line
    text: str
    fatal: bool = False  # the whole entry cannot be used

    def __str__(self) -> str:
        where, text = (
            part if len(part) <= MOST_SHOWN else f"{part[:MOST_SHOWN]}..." for part in (self.where, self.text)
        )
        return printable(f"{where}: {text}")


class AnnotatedObject(msgspec.Struct, frozen=True, gc=False):
    """One box with its category or phrase."""

    box: Box  # pixels of the upright image, not clipped
    label: int  # number of its category in the file (-1: the format has names only), or its index in `regions`
    name: str  # of its category, or its phrase
    number: int  # in the file or the entry, from 1
    flags: frozenset[str] = NO_FLAGS  # of FLAGS
    extra: Any = None  # the object as in its file, for a writer of the same format


class AnnotatedImage(msgspec.Struct, frozen=True):
    """One annotated image: its caption or categories, and its boxes."""

    where: str  # file and line, for messages
    file_name: str = ""  # below the image folder
    width: int = 0  # pixels of the upright image; 0 where the format does not say
    height: int = 0
    objects: tuple[AnnotatedObject, ...] = ()
    caption: str | None = None  # None: detection data
    regions: tuple[Spans, ...] = ()  # per region, the characters of the caption that name it
    problems: tuple[Problem, ...] = ()
    object_unit: str = "object"  # what `AnnotatedObject.number` counts
    box_form: str = "xyxy"  # or "xywh": how messages show boxes
    number: int = 0  # of the entry in its file, from 1
    image_id: int | str = 0  # where the format has ids
    extra: Any = None  # the entry as in its file, for a writer of the same format

    @property
    def usable(self) -> bool:
        """False if a problem makes the whole entry useless."""
        return not any(problem.fatal for problem in self.problems)


@dataclass(frozen=True)
class ReadOptions:
    """How annotations are read."""

    images: Path | None = None  # the folder that file names are below; None: looked for near the annotations
    label_map: Path | None = None  # ODVG detection data: {"0": "person", ...}
    split: str | None = None  # of a data set that names its splits; None: all of it
    allow_outside: bool = False  # accept absolute file names and those that leave the image folder by ".."


@dataclass(frozen=True)
class Reading:
    """Annotations that were opened: iterate it, as often as you like, for its `AnnotatedImage`s."""

    path: Path
    format: str
    entries: Callable[[], Iterator[AnnotatedImage]]
    images: Path  # the folder that file names are below
    declared: Mapping[int, str] | None = None  # category number -> name, where the format lists them
    problems: tuple[Problem, ...] = ()  # of the file as a whole
    extra: Mapping[str, Any] = field(default_factory=dict)  # for a writer of the same format

    def __iter__(self) -> Iterator[AnnotatedImage]:
        return self.entries()

    @cached_property
    def categories(self) -> Mapping[int, str]:
        """Number -> name: the declared ones, else the names in use, sorted and counted from 0."""
        if self.declared is not None:
            return self.declared
        return dict(enumerate(sorted({thing.name for entry in self for thing in entry.objects})))

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        return {name: number for number, name in sorted(self.categories.items(), reverse=True)}

    def category_of(self, thing: AnnotatedObject) -> int:
        """The number of an object's category in `categories`; of names that two categories share, by its label."""
        return thing.label if self.categories.get(thing.label) == thing.name else self._numbers[thing.name]

    def is_grounding(self) -> bool:
        """Whether the first usable entry has a caption."""
        return next((entry.caption is not None for entry in self if entry.usable), False)


def checked(entry: AnnotatedImage, allow_outside: bool = False) -> AnnotatedImage:
    """The entry without boxes that cannot be used, and with the problems of its file name, size and boxes."""
    problems = [*entry.problems]
    leaving = None if allow_outside else file_name_problem(entry.file_name)
    if leaving is not None:
        problems.append(Problem(Kind.FILE_NAME, entry.where, leaving, fatal=True))
    if entry.caption is not None and len(entry.caption) > MOST_CHARACTERS:
        text = f"the caption is {len(entry.caption):,} characters long, at most {MOST_CHARACTERS:,} are read"
        problems.append(Problem(Kind.LONG_CAPTION, entry.where, text, fatal=True))
    width, height = entry.width, entry.height
    if not (0 <= width <= LARGEST and 0 <= height <= LARGEST):
        text = f"size {str(width)[:20]}x{str(height)[:20]} is not a picture's"
        problems.append(Problem(Kind.IMAGE_SIZE, entry.where, text, fatal=True))
        return msgspec.structs.replace(entry, width=0, height=0, objects=(), problems=tuple(problems))
    kept = []
    for thing in entry.objects:
        found = box_problem(thing.box, width, height, entry.box_form)
        if found is None:
            kept.append(thing)
        else:
            text = f"{entry.object_unit} {thing.number}: {found[1]}"
            problems.append(Problem(found[0], entry.where, text))
    if len(problems) == len(entry.problems):
        return entry
    return msgspec.structs.replace(entry, objects=tuple(kept), problems=tuple(problems))


def first_file_name(entries: Iterable[AnnotatedImage]) -> str:
    """The image file of the first usable entry, by which the folder of images is guessed; "" without one."""
    return next((entry.file_name for entry in entries if entry.usable), "")


def unusable(where: str, text: str, kind: Kind = Kind.MALFORMED, number: int = 0) -> AnnotatedImage:
    """An entry that could not be read."""
    return AnnotatedImage(where, problems=(Problem(kind, where, text, fatal=True),), number=number)


def file_name_problem(name: str) -> str | None:
    """Why a file name may not be used, or None."""
    if not name:
        return "file name is empty"
    if "\0" in name or len(name) > MOST_PATH or any(len(part.encode()) > MOST_NAME for part in name.split("/")):
        return f"file name {name[:40]!r}{'...' if len(name) > 40 else ''} cannot be the name of a file"
    if name[0] not in "/\\" and name[1:2] != ":" and ".." not in name:
        return None
    pure = PureWindowsPath(name) if "\\" in name or name[1:2] == ":" else PurePosixPath(name)
    if pure.is_absolute() or pure.drive or pure.root:
        return f"file name {name[:80]!r} is absolute; a name is below the image folder"
    if ".." in pure.parts:
        return f'file name {name[:80]!r} leaves the image folder by ".."'
    return None


def box_problem(box: Box, width: int, height: int, form: str = "xyxy") -> tuple[Kind, str] | None:
    """Why a box cannot be used, or None. With a width of 0 the image's size is unknown and not looked at."""
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    if not (-LARGEST <= x1 and -LARGEST <= y1 and x2 <= LARGEST and y2 <= LARGEST):  # NaN, too
        return Kind.MALFORMED, "box is not four finite pixel coordinates"
    sizeless = w < MIN_SIDE - ROUNDING or h < MIN_SIDE - ROUNDING
    if not sizeless and (not width or (min(x2, width) > max(x1, 0) and min(y2, height) > max(y1, 0))):
        return None
    shown = f"box [{x1:g}, {y1:g}, {x2:g}, {y2:g}] (x1, y1, x2, y2)"
    if form == "xywh":
        shown = f"box [{x1:g}, {y1:g}, {w:g}, {h:g}] (x, y, width, height)"
    if width and (x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height):
        return Kind.BOX_OUTSIDE, f"{shown} lies outside the {width}x{height} image"
    return Kind.BOX_AREA, f"{shown} has no area"
