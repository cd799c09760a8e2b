"""`groundingdino data check`: everything that is wrong with a data set, by kind, with file and line."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from groundingdino.data.data_counts import Counts
from groundingdino.data.formats.record import (
    NOTES,
    AnnotatedImage,
    AnnotatedObject,
    Kind,
    Problem,
    Reading,
    ReadOptions,
)
from groundingdino.data.formats.registry import read_splits, writable_format
from groundingdino.data.formats.writers import WRITERS, Written
from groundingdino.data.image_checks import ImageFacts, examine_all, turn_box
from groundingdino.inputs import text
from groundingdino.inputs.text import Span

EDGE_TOLERANCE = 1.0  # pixels past the edge that nobody minds: tools round, and VOC counts from 1
QUERIES = 900  # of the released models
KEPT_PER_KIND = 1000  # problems that a report holds; all are counted
LAST_WITHOUT_SPACES = "\u2e80"  # from here on, scripts such as Chinese write words without spaces between them

Progress = Callable[[int], Callable[[], object]]  # number of images -> what is called after each


@dataclass(frozen=True)
class CheckOptions:
    """What is checked, and against which model."""

    open_images: bool = True
    max_tokens: int = text.MAX_TOKENS
    max_objects: int = QUERIES


@dataclass
class Report:
    """What a check found."""

    counts: dict[str, Counts] = field(default_factory=dict)  # per split
    found: Counter[Kind] = field(default_factory=Counter)
    problems: dict[Kind, list[Problem]] = field(default_factory=lambda: defaultdict(list))  # the first of each kind

    def add(self, problem: Problem) -> None:
        """Count a problem, and keep it if there is room."""
        self.found[problem.kind] += 1
        if len(self.problems[problem.kind]) < KEPT_PER_KIND:
            self.problems[problem.kind].append(problem)

    @property
    def failed(self) -> bool:
        """Whether there is anything but notes."""
        return any(kind not in NOTES for kind in self.found)

    def lines(self, shown: int = 5) -> Iterator[str]:
        """The report, `shown` problems of each kind."""
        for kind in (kind for kind in Kind if kind in self.found):
            note = " (note)" if kind in NOTES else ""
            yield f"{kind.value}: {self.found[kind]:,}{note}"
            yield from (f"  {problem}" for problem in self.problems[kind][:shown])
            if self.found[kind] > shown:
                yield f"  ... and {self.found[kind] - shown:,} more"
        if not self.found:
            yield "no problem found"


def check(
    path: Path, options: ReadOptions | None = None, checks: CheckOptions | None = None, progress: Progress | None = None
) -> Report:
    """Read a data set, open its images, and report what is wrong.

    Args:
        path: file or folder of any format.
        options: how it is read.
        checks: what is checked.
        progress: given the number of images, returns what is called after each.
    Raises:
        ValueError: if there is no data set.
    """
    return check_splits(read_splits(path, options), checks or CheckOptions(), progress)[0]


def check_splits(
    splits: Mapping[str, Reading], checks: CheckOptions, progress: Progress | None = None
) -> tuple[Report, dict[Path, ImageFacts]]:
    """The report on opened splits, and what was found in each image file."""
    report = Report()
    owners: dict[Path, dict[str, str]] = defaultdict(dict)  # image file -> split -> where
    sizes: dict[Path, list[tuple[str, tuple[int, int]]]] = defaultdict(list)  # image file -> where, annotated size
    for split, reading in splits.items():
        counts = report.counts.setdefault(split, Counts())
        for problem in reading.problems:
            report.add(problem)
        for entry in _check_entries(reading, checks, counts, report):
            if entry.usable and (checks.open_images or len(splits) > 1):
                image = reading.images / entry.file_name
                owners[image].setdefault(split, entry.where)
                size = (entry.width, entry.height)
                if checks.open_images and (not sizes[image] or size != sizes[image][-1][1]):
                    sizes[image].append((entry.where, size))
        _check_categories(reading, checks, counts, report)
    _check_leaks(owners, report)
    facts = {}
    if checks.open_images:
        for image, found in examine_all(sizes, progress(len(sizes)) if progress else lambda: None):
            facts[image] = found
            for where, size in sizes[image]:
                for problem in _image_problems(image, where, size, found):
                    report.add(problem)
        _check_contents(facts, owners, report)
    return report, facts


def _check_entries(reading: Reading, checks: CheckOptions, counts: Counts, report: Report) -> Iterator[AnnotatedImage]:
    """The entries, each counted and checked."""
    tokenizer = text.default_tokenizer()
    seen: set[str] = set()
    for entry in reading:
        for problem in entry.problems:
            report.add(problem)
        yield entry
        if not entry.usable:
            continue
        counts.add(entry)
        objects = entry.objects
        if not objects:
            report.add(Problem(Kind.EMPTY_IMAGE, entry.where, f"{entry.file_name}: no box"))
        if len(objects) > checks.max_objects:
            told = f"{len(objects)} objects, the model has {checks.max_objects} queries"
            report.add(Problem(Kind.MANY_OBJECTS, entry.where, told))
        for thing in objects:
            past = _past_edge(thing, entry.width, entry.height)
            if past > EDGE_TOLERANCE:
                x1, y1, x2, y2 = thing.box
                told = f"{entry.object_unit} {thing.number}: box [{x1:g}, {y1:g}, {x2:g}, {y2:g}] (x1, y1, x2, y2) is"
                told += f" {past:g} pixels past the edge of the {entry.width}x{entry.height} image"
                report.add(Problem(Kind.BOX_PAST_EDGE, entry.where, told))
        if entry.caption is not None:
            for problem in _caption_problems(entry, entry.caption, tokenizer, checks.max_tokens):
                report.add(problem)
        elif entry.file_name in seen:
            told = f"{entry.file_name} was annotated before; its boxes belong in one entry"
            report.add(Problem(Kind.DUPLICATE_IMAGE, entry.where, told))
        else:
            seen.add(entry.file_name)


def _past_edge(thing: AnnotatedObject, width: int, height: int) -> float:
    x1, y1, x2, y2 = thing.box
    return max(-x1, -y1, x2 - width, y2 - height) if width else 0.0


def _caption_problems(
    entry: AnnotatedImage, caption: str, tokenizer: text.CaptionTokenizer, max_tokens: int
) -> Iterator[Problem]:
    if not caption.strip():
        yield Problem(Kind.UNNAMED, entry.where, "its caption is empty")
    for spans in entry.regions:
        for start, end in spans:
            fixed = whole_words(caption, (start, end))
            if fixed != (start, end):
                told = f"span [{start}, {end}] is {caption[start:end]!r:.60}; whole words are {list(fixed)}"
                yield Problem(Kind.SPAN_OFF, entry.where, told)
    # A token covers at least one character; [CLS], [SEP] and a final "." come on top.
    if len(caption) > max_tokens - 3:
        length = len(tokenizer.encode(text.finish_caption(caption)).token_ids)
        if length > max_tokens:
            told = f"the caption is {length:,} tokens long, {max_tokens} are read"
            yield Problem(Kind.LONG_CAPTION, entry.where, told)


def whole_words(caption: str, span: Span) -> Span:
    """The span without spaces at its ends, and widened to the words that it cuts."""
    start, end = span
    while start < end and caption[start].isspace():
        start += 1
    while start < end and caption[end - 1].isspace():
        end -= 1
    if start == end:
        return span
    while start > 0 and _joined(caption[start - 1], caption[start]):
        start -= 1
    while end < len(caption) and _joined(caption[end - 1], caption[end]):
        end += 1
    return start, end


def _joined(left: str, right: str) -> bool:
    return left.isalnum() and right.isalnum() and max(left, right) < LAST_WITHOUT_SPACES


def _check_categories(reading: Reading, checks: CheckOptions, counts: Counts, report: Report) -> None:
    """Names that no token stands for, that are equal once cleaned, too long, unused; a list of several prompts."""
    if reading.is_grounding():
        return
    where, tokenizer = str(reading.path), text.default_tokenizer()
    by_prompt: dict[str, list[str]] = defaultdict(list)
    usable = []
    for number, name in reading.categories.items():
        cleaned = " ".join(text.clean_name(name).lower().split())
        length = len(tokenizer.encode(cleaned).token_ids) - 2
        if length == 0:
            told = f"category {name!r:.80} (number {number}) is no word once cleaned; rename it"
            report.add(Problem(Kind.CATEGORY_NAME, where, told))
        elif length > checks.max_tokens - 3:
            told = f"category {name!r:.80} is {length} tokens long, a prompt holds {checks.max_tokens - 3}"
            report.add(Problem(Kind.CATEGORY_NAME, where, told))
        else:
            usable.append(name)
            by_prompt[cleaned].append(name)
        if name not in counts.categories:
            report.add(Problem(Kind.UNUSED_CATEGORY, where, f"category {name!r:.80} (number {number}) has no box"))
    for cleaned, names in by_prompt.items():
        if len(names) > 1:
            told = (
                f"{len(names)} categories are called {cleaned!r:.80} in a prompt: {', '.join(map(repr, names))[:200]}"
            )
            report.add(Problem(Kind.SAME_NAME, where, told))
    prompts = len(text.split_by_tokens(usable, tokenizer, checks.max_tokens)) if usable else 0
    if prompts > 1:
        told = f"{len(usable)} categories are {prompts} prompts of at most {checks.max_tokens} tokens"
        report.add(Problem(Kind.LONG_PROMPT, where, told))


def _image_problems(image: Path, where: str, size: tuple[int, int], facts: ImageFacts) -> Iterator[Problem]:
    if facts.missing:
        yield Problem(Kind.MISSING_IMAGE, where, f"{image}: no such image file")
    elif facts.error:
        yield Problem(Kind.BROKEN_IMAGE, where, f"{image}: not a readable image ({facts.error})")
    elif size == facts.size or size == (0, 0):  # 0x0 was said when it was read
        if facts.orientation != 1:
            told = f"{image}: turned by its EXIF tag ({facts.orientation}); its boxes are taken for upright"
            yield Problem(Kind.EXIF, where, told)
    else:
        annotated, found = (f"{width}x{height}" for width, height in (size, facts.size))
        if size == facts.stored:
            told = f"{image}: annotated as {annotated}, but its EXIF tag ({facts.orientation}) turns it to {found}"
            yield Problem(Kind.ROTATED, where, told)
        else:
            yield Problem(Kind.IMAGE_SIZE, where, f"{image} is {found}, annotated for {annotated}: boxes would be off")


def _check_leaks(owners: Mapping[Path, Mapping[str, str]], report: Report) -> None:
    for image, splits in owners.items():
        if len(splits) > 1:
            told = f"{image.name} is in {' and '.join(splits)}"
            report.add(Problem(Kind.LEAK, list(splits.values())[-1], told))


def _check_contents(facts: Mapping[Path, ImageFacts], owners: Mapping[Path, Mapping[str, str]], report: Report) -> None:
    """Files with the same bytes: copies within a split, leaks between splits."""
    groups: dict[bytes, list[Path]] = defaultdict(list)
    for image, found in facts.items():
        if found.digest:
            groups[found.digest].append(image)
    for images in groups.values():
        first = images[0]
        for image in images[1:]:
            where = next(iter(owners[image].values()))
            splits = [next(iter(owners[one])) for one in (first, image)]
            if splits[0] == splits[1]:
                report.add(Problem(Kind.DUPLICATE_IMAGE, where, f"{image} is the same image as {first}"))
            else:
                told = f"{image} ({splits[1]}) is the same image as {first} ({splits[0]})"
                report.add(Problem(Kind.LEAK, where, told))


def fix(splits: Mapping[str, Reading], facts: Mapping[Path, ImageFacts], target: Path) -> tuple[Written, Counter[str]]:
    """Write a corrected copy, in the data set's own format where we write it, else in COCO's or ODVG's.

    Entries and boxes that cannot be used are left out, boxes are cut at the image's edge and turned with it, sizes of
    0x0 come from the images, spans are widened to whole words, and of copies the first stays.

    Returns:
        What was written, and how often each thing was changed.
    """
    changes: Counter[str] = Counter()
    first = next(iter(splits.values()))
    to = writable_format(first)
    digests: set[bytes] = set()

    def corrected(reading: Reading) -> Iterator[AnnotatedImage]:
        for entry in reading:
            for problem in entry.problems:
                if problem.kind not in NOTES:
                    changes[
                        f"{problem.kind.value}: {'entry left out' if problem.fatal else 'corrected or left out'}"
                    ] += 1
            if entry.usable:
                found = facts.get(reading.images / entry.file_name, ImageFacts())
                better = _fix_entry(entry, found, changes)
                if entry.caption is None and found.digest and found.digest in digests:
                    changes[f"{Kind.DUPLICATE_IMAGE.value}: left out"] += 1
                elif better is not None:
                    digests.add(found.digest)
                    yield better

    fixed = {}
    for split, reading in splits.items():
        entries = list(corrected(reading))
        clean = [msgspec.structs.replace(entry, problems=()) for entry in entries]
        fixed[split] = replace(reading, entries=lambda clean=clean: iter(clean), problems=())  # type: ignore[misc]
    return WRITERS[to](fixed, target, "leave" if to in ("coco", "odvg") else "link"), changes


def _fix_entry(entry: AnnotatedImage, facts: ImageFacts, changes: Counter[str]) -> AnnotatedImage | None:
    size = (entry.width, entry.height)
    if facts.missing or facts.error:
        changes["image missing or broken: entry left out"] += 1
        return None
    objects = entry.objects
    if facts.digest and size not in (facts.size, (0, 0)):
        if size != facts.stored:
            changes[f"{Kind.IMAGE_SIZE.value}: entry left out"] += 1
            return None
        changes[f"{Kind.ROTATED.value}: turned"] += 1
        objects = tuple(
            msgspec.structs.replace(thing, box=turn_box(thing.box, facts.stored, facts.orientation))
            for thing in objects
        )
        entry = msgspec.structs.replace(entry, width=facts.size[0], height=facts.size[1])
    kept = []
    for thing in objects:
        if _past_edge(thing, entry.width, entry.height) > 0:
            x1, y1, x2, y2 = thing.box
            changes[f"{Kind.BOX_PAST_EDGE.value}: cut"] += 1
            cut = (max(x1, 0), max(y1, 0), min(x2, entry.width), min(y2, entry.height))
            thing = msgspec.structs.replace(thing, box=cut)
        kept.append(thing)
    regions = entry.regions
    if entry.caption is not None:
        caption = entry.caption
        regions = tuple(tuple(whole_words(caption, span) for span in spans) for spans in entry.regions)
        changed = sum(new != old for new, old in zip(regions, entry.regions, strict=True))
        if changed:
            changes[f"{Kind.SPAN_OFF.value}: widened to whole words"] += changed
    return msgspec.structs.replace(entry, objects=tuple(kept), regions=regions)
