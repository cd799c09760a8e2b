"""A data set of any format made ready to train on: ODVG lines to train, COCO's json to validate and test."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from groundingdino.data import split as splitting
from groundingdino.data.formats import registry
from groundingdino.data.formats.odvg import map_path
from groundingdino.data.formats.record import AnnotatedImage, Problem, Reading, ReadOptions
from groundingdino.data.formats.writers import write_coco, write_odvg

ALL_SHARES = (0.8, 0.1, 0.1)  # of a data set without splits: train, val, test
TRAIN_SHARES = (0.9, 0.1)  # of a training split without a validation split: train, val
MOST_SHOWN = 200  # characters of a list of names


@dataclass(frozen=True)
class Prepared:
    """What there is to train on and to evaluate, by split: train, val and perhaps test."""

    folder: Path
    files: Mapping[str, Path]
    images: Mapping[str, Path]  # folders
    counts: Mapping[str, int]  # images, or captions of grounding data
    objects: int  # of all splits that were written
    label_map: Path | None  # of the training file; None: captions
    categories: tuple[str, ...]
    format: str
    notes: tuple[str, ...]  # what was decided for the user
    problems: tuple[Problem, ...]  # what was left out


def prepare(
    source: Path, folder: Path, options: ReadOptions | None = None, names: Mapping[str, str] | None = None
) -> Prepared:
    """Read a data set and write its splits into `folder`; the same data give the same files.

    Args:
        source: file or folder of any format. Splits are found by their usual names; what is missing is split off.
        folder: gets train.jsonl with its label map, val.json and test.json. Images stay where they are.
        options: how `source` is read.
        names: category -> what to call it in prompts; categories that get one name become one.
    Raises:
        ValueError: if there is no data set, nothing to train on or to validate, or `names` has an unknown category.
    """
    splits, notes = _find_splits(registry.read_splits(source, options), source)
    captions = splits["train"].is_grounding()
    if names:
        _check_names(names, splits, captions)
        splits = {split: renamed(reading, names) for split, reading in splits.items()}
    train = write_odvg({"train": splits["train"]}, folder / "train.jsonl", "leave")
    written, files = [train], {"train": folder / "train.jsonl"}
    for split, reading in list(splits.items())[1:]:
        if captions and reading.format == "mdetr" and reading.path != splits["train"].path:
            files[split] = reading.path  # expressions, which COCO's format does not hold
            continue
        files[split] = folder / f"{split}.json"
        written.append(write_coco({split: reading}, files[split], "leave"))
    counts = {split: count for part in written for split, count in part.counts.items()}
    empty = next((split for split in ("train", "val") if counts.get(split) == 0), None)
    if empty is not None:
        raise ValueError(f"{source}: no usable entry in {empty}; `groundingdino data check` says why")
    if counts.get("test") == 0:  # a tenth of few images
        del files["test"]
        notes.append("no image is left to test on")
    return Prepared(
        folder,
        files,
        {split: reading.images for split, reading in splits.items()},
        counts,
        sum(part.objects for part in written),
        None if captions else map_path(files["train"], "train"),
        () if captions else tuple(dict.fromkeys(splits["train"].categories.values())),
        splits["train"].format,
        (*notes, *_strangers(splits, captions)),
        tuple(problem for part in written for problem in part.problems),
    )


def _find_splits(found: Mapping[str, Reading], source: Path) -> tuple[dict[str, Reading], list[str]]:
    """train, val and perhaps test, and what was decided on the way."""
    chosen = {split: name for split in registry.SPLIT_NAMES if (name := _choose(split, found)) is not None}
    if "train" not in chosen:
        if len(found) > 1:
            raise ValueError(f"{source}: no training split among {', '.join(found)}; name the file or folder of one")
        parts = splitting.part(next(iter(found.values())), ALL_SHARES)
        return parts, [f"no splits found: split by image into train, val and test, {_percent(ALL_SHARES)}"]
    splits = {split: found[name] for split, name in chosen.items()}
    notes = [f"{split}: {name}" for split, name in chosen.items() if name != split]
    if "val" not in splits:
        notes.append(f"no validation split found: train was split by image, {_percent(TRAIN_SHARES)}")
        splits |= splitting.part(splits["train"], TRAIN_SHARES)
    return {split: splits[split] for split in registry.SPLIT_NAMES if split in splits}, notes


def _choose(split: str, found: Mapping[str, Reading]) -> str | None:
    """The name of a split among those found; of several annotation files COCO's instances."""
    candidates = [name for name in found if any(word in name.lower() for word in registry.SPLIT_NAMES[split])]
    candidates.sort(key=lambda name: (name != split, "instances" not in name))
    return next(iter(candidates), None)


def _percent(shares: tuple[float, ...]) -> str:
    return " / ".join(f"{share:.0%}" for share in shares)


def _check_names(names: Mapping[str, str], splits: Mapping[str, Reading], captions: bool) -> None:
    if captions:
        raise ValueError("names are for categories, and these data have captions")
    known = {name for reading in splits.values() for name in reading.categories.values()}
    unknown = sorted(set(names) - known)
    if unknown:
        there_are = ", ".join(sorted(known))[:MOST_SHOWN]
        raise ValueError(f"names for {', '.join(unknown)[:MOST_SHOWN]}, which the data do not have: {there_are}")


def renamed(reading: Reading, names: Mapping[str, str]) -> Reading:
    """A data set with other names for its categories; those that get one name become one category, the first."""
    declared: dict[int, str] = {}
    for number, name in sorted(reading.categories.items()):
        if (new := names.get(name, name)) not in declared.values():
            declared[number] = new

    def entries() -> Iterator[AnnotatedImage]:
        for entry in reading:
            objects = tuple(msgspec.structs.replace(o, name=names.get(o.name, o.name)) for o in entry.objects)
            yield msgspec.structs.replace(entry, objects=objects)

    return replace(reading, entries=entries, declared=declared, extra={**reading.extra, "renamed": True})


def _strangers(splits: Mapping[str, Reading], captions: bool) -> list[str]:
    """One line that names the categories that are evaluated but not trained; none without any."""
    if captions:
        return []
    trained = set(splits["train"].categories.values())
    others = {name for reading in splits.values() for name in reading.categories.values()} - trained
    return [f"evaluated, but not trained: {', '.join(sorted(others))[:MOST_SHOWN]}"] if others else []
