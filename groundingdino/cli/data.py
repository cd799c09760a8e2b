"""Work on annotations: `groundingdino data COMMAND`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from groundingdino.cli import console
from groundingdino.runtime.messages import printable

if TYPE_CHECKING:
    from groundingdino.data.formats.record import Problem, ReadOptions

SHOWN = 10  # lines about what was left out
PROBLEMS = 1  # exit code of `check` where the data has problems
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is read, and how."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """file or folder; its format is found by what it holds: COCO, LVIS, Pascal VOC, YOLO, CVAT, LabelMe, OpenImages,
    CSV, ODVG, MDETR"""
    images: Path | None = None
    """the folder of the images; default: looked for near the annotations"""
    label_map: Path | None = None
    """names of ODVG detection data, such as {"0": "person"}; default: the one beside the file, else the lines' own"""
    split: str | None = None
    """train, val or test of a data set that has them; default: all"""
    allow_outside: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """accept file names that are absolute or leave the image folder by ".." """

    @property
    def options(self) -> "ReadOptions":
        """How `source` is read."""
        from groundingdino.data.formats.record import ReadOptions

        return ReadOptions(self.images, self.label_map, self.split, self.allow_outside)


@dataclass(frozen=True, kw_only=True)
class Convert(Source):
    """Convert annotations of any known format to COCO, YOLO, Pascal VOC or ODVG.

    ODVG files equal those of mmdet's tools/dataset_converters.
    """

    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """the folder to write; of one split also a .json or .jsonl file"""
    to: Literal["coco", "yolo", "voc", "odvg"]
    """the format to write"""
    place_images: Literal["leave", "link", "copy"] | None = None
    """what becomes of the images; default: linked into YOLO's and VOC's folders, else left where they are"""


@dataclass(frozen=True, kw_only=True)
class Check(Source):
    """Report everything that is wrong with a data set, by kind, with file and line. Exit code 1 with problems."""

    no_images: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """do not open the images (sizes of YOLO's and OpenImages' are read from their headers all the same)"""
    shown: int = 5
    """problems of each kind that are printed"""
    queries: int = 900
    """objects per image that the model can find"""
    max_tokens: int = 256
    """tokens of a prompt that the model reads"""
    picture: Path | None = None
    """draw counts and sizes into this file"""
    fix: Path | None = None
    """write a corrected copy to this new folder (of one split also a .json or .jsonl file)"""


@dataclass(frozen=True, kw_only=True)
class Show(Source):
    """Draw annotated pictures: a grid in one file, or a folder of them."""

    out: Path = Path("annotations.png")
    """a .png or .jpg file for a grid, else a folder"""
    count: int = 16
    """images, chosen at random"""
    columns: int = 4
    """of the grid"""
    seed: int = 0
    """of the choice"""


@dataclass(frozen=True, kw_only=True)
class Split(Source):
    """Split a data set by image, each category in proportion, the same way every time."""

    shares: Annotated[tuple[float, ...], tyro.conf.Positional]
    """of train, val and test, such as 0.8 0.1 0.1"""
    out: Path
    """the folder to write"""
    seed: int = 0
    """decides among equals"""


def convert(arguments: Convert) -> int:
    """Write the data set, and say what was left out. The exit code."""
    from groundingdino.data.convert import convert as convert_data

    written = convert_data(arguments.source, arguments.target, arguments.to, arguments.options, arguments.place_images)
    _print_problems(written.problems)
    _print_written(written.counts, written.objects, written.files)
    return 0


def _print_problems(problems: "Sequence[Problem]") -> None:
    for problem in problems[:SHOWN]:
        print(f"{problem.kind.value}: {printable(problem)}")
    if len(problems) > SHOWN:
        print(f"... and {len(problems) - SHOWN:,} more; `groundingdino data check` lists them by kind")


def _print_written(counts: dict[str, int], objects: int, files: Sequence[Path]) -> None:
    parts = ", ".join(f"{count:,} {'' if split == 'all' else split + ' '}entries" for split, count in counts.items())
    print(f"{parts} with {objects:,} boxes written: {', '.join(printable(file) for file in files)}")


def check(arguments: Check) -> int:
    """Print the report. The exit code."""
    from tqdm import tqdm

    from groundingdino.data import data_counts
    from groundingdino.data.formats.registry import read_splits
    from groundingdino.data.validate import CheckOptions, check_splits, fix

    splits = read_splits(arguments.source, arguments.options)
    checks = CheckOptions(not arguments.no_images, arguments.max_tokens, arguments.queries)
    report, facts = check_splits(
        splits, checks, lambda total: tqdm(total=total, desc="images", leave=False, disable=None).update
    )
    for split, reading in splits.items():
        print(f"{printable(reading.path)}: {reading.format}, {split}, images in {reading.images}")
    print()
    for line in (*report.lines(arguments.shown), "", *data_counts.table(report.counts)):
        print(printable(line))
    if arguments.picture is not None:
        data_counts.draw(report.counts, arguments.picture)
        print(f"\ndrawn: {arguments.picture}")
    if arguments.fix is not None:
        written, changes = fix(splits, facts, arguments.fix)
        print("\n" + "\n".join(f"{change}: {times:,}" for change, times in sorted(changes.items())))
        _print_written(written.counts, written.objects, written.files)
    return PROBLEMS if report.failed else 0


def show(arguments: Show) -> int:
    """Draw the pictures. The exit code."""
    from groundingdino.cli.annotated_pictures import draw_grid, draw_into
    from groundingdino.data.formats.registry import read_splits

    splits = read_splits(arguments.source, arguments.options)
    if arguments.out.suffix.lower() in PICTURE_SUFFIXES:
        drawn = draw_grid(splits.values(), arguments.out, arguments.count, arguments.columns, arguments.seed)
    else:
        drawn = draw_into(splits.values(), arguments.out, arguments.count, arguments.seed)
    print(f"{drawn} annotated images drawn: {arguments.out}")
    return 0


def split(arguments: Split) -> int:
    """Write the parts. The exit code."""
    from groundingdino.data.split import split as split_data

    written = split_data(arguments.source, arguments.shares, arguments.out, arguments.options, arguments.seed)
    _print_problems(written.problems)
    _print_written(written.counts, written.objects, written.files)
    return 0


# name -> (arguments, what runs with them, one line of help)
COMMANDS: dict[str, tuple[type, Callable[..., int], str]] = {
    "convert": (Convert, convert, "any format -> COCO, YOLO, Pascal VOC or ODVG"),
    "check": (Check, check, "find what is wrong with a data set, count it, correct it"),
    "show": (Show, show, "draw annotated pictures"),
    "split": (Split, split, "split by image into train, val and test"),
}


def main(arguments: Sequence[str], prog: str = "groundingdino data") -> int:
    """Run the command that `arguments` name. The exit code."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name not in COMMANDS:
        summaries = {command: summary for command, (_, _, summary) in COMMANDS.items()}
        return console.answer_without_command(prog, name, summaries, "Work on annotation files.")
    form, command, _ = COMMANDS[name]
    prog = f"{prog} {name}"
    return console.run(prog, lambda: command(console.parse(form, rest, prog)))
