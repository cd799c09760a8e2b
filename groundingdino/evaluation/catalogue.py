"""Every protocol by name: where its files are below a data root, and what of it is evaluated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from groundingdino.evaluation import coco, dod, flickr30k, grefcoco, lvis, odinw
from groundingdino.evaluation.answers import Floats, Integers
from groundingdino.evaluation.report import Figures
from groundingdino.evaluation.runner import EvaluationProtocol
from groundingdino.inference.vocabulary import Vocabulary


class DescribedProtocol(EvaluationProtocol[Figures], Protocol):
    """A protocol that can say what it does."""

    def description(self) -> dict[str, str]:
        """The protocol spelled out, for reports."""
        ...

    def picture(self, image_id: int) -> tuple[Path, Floats, Integers, tuple[str, ...]]:
        """For pictures: the file, its annotated boxes (N, 4), their labels (N,), and the names of all labels."""
        ...


@dataclass(frozen=True)
class Request:
    """What to evaluate."""

    data_root: Path
    split: str  # one of the protocol's `splits`
    annotations: Path | None = None  # another file in place of the split's
    images: Path | None = None  # another folder in place of the protocol's
    names_per_caption: int | None = None  # lvis: other than the published 40; 0 for as many as fit
    vocabulary: Vocabulary | None = None  # coco: prompts of the categories


@dataclass(frozen=True)
class Part:
    """One thing that gets figures of its own: a split, or a data set of a suite."""

    name: str
    load: Callable[[], DescribedProtocol]  # ValueError, naming it, if a file is missing


@dataclass(frozen=True)
class Entry:
    """A protocol of the catalogue."""

    splits: tuple[str, ...]  # the first is the default
    data_root: Path  # default
    files: str  # what is expected below it, for messages
    parts: Callable[[Request], tuple[Part, ...]]


def _coco(request: Request) -> tuple[Part, ...]:
    open_vocabulary = request.split == "val2017-48-17"
    name = "instances_val2017_all_2" if open_vocabulary else f"instances_{request.split}"
    path = request.annotations or request.data_root / "annotations" / f"{name}.json"
    images = request.images or request.data_root / request.split[:7]
    split = coco.CategorySplit() if open_vocabulary else None

    def load() -> coco.CocoDetection:
        return replace(coco.CocoDetection.load(path, images, split), vocabulary=request.vocabulary)

    return (Part(request.split, load),)


LVIS_FILES = {"minival": "lvis_v1_minival_inserted_image_name", "val": "lvis_v1_val"}


def _lvis(request: Request) -> tuple[Part, ...]:
    path = request.annotations or request.data_root / "annotations" / f"{LVIS_FILES[request.split]}.json"
    most = lvis.NAMES_PER_CAPTION if request.names_per_caption is None else request.names_per_caption or None
    return (Part(request.split, lambda: lvis.Lvis.load(path, request.images or request.data_root, most)),)


def _grefcoco(request: Request) -> tuple[Part, ...]:
    stem = f"finetune_grefcoco_{request.split}"
    path = request.annotations or request.data_root / "mdetr_annotations" / f"{stem}.json"
    images = request.images or request.data_root / "train2014"
    return (Part(request.split, lambda: grefcoco.Grefcoco.load(path, images)),)


def _flickr30k(request: Request) -> tuple[Part, ...]:
    stem = f"final_flickr_separateGT_{request.split}"
    path = request.annotations or request.data_root / "mdetr_annotations" / f"{stem}.json"
    images = request.images or request.data_root / "flickr30k_images"
    return (Part(request.split, lambda: flickr30k.Flickr30k.load(path, images)),)


def _odinw(request: Request) -> tuple[Part, ...]:
    def loader(data_set: odinw.DataSet) -> Callable[[], DescribedProtocol]:
        return lambda: odinw.OdinwDetection.load(data_set, request.data_root)

    return tuple(Part(data_set.name, loader(data_set)) for data_set in odinw.SUITES[request.split])


def _dod(request: Request) -> tuple[Part, ...]:
    parallel = request.split == "parallel"
    return (Part(request.split, lambda: dod.DescribedDetection.load(request.data_root, parallel)),)


CATALOGUE: Mapping[str, Entry] = {
    "coco": Entry(("val2017", "val2017-48-17"), Path("coco"), "annotations/instances_val2017.json and val2017/", _coco),
    "lvis": Entry(("minival", "val"), Path("coco"), "annotations/lvis_v1_*.json, train2017/ and val2017/", _lvis),
    "grefcoco": Entry(
        ("val", "testA", "testB"),
        Path("refcoco"),
        "mdetr_annotations/finetune_grefcoco_*.json and train2014/",
        _grefcoco,
    ),
    "flickr30k": Entry(
        ("val", "test"),
        Path("flickr30k"),
        "mdetr_annotations/final_flickr_separateGT_*.json and flickr30k_images/",
        _flickr30k,
    ),
    "odinw": Entry(("13", "35"), Path("odinw"), "the data sets' folders, such as Aquarium/ and pothole/", _odinw),
    "dod": Entry(("concat", "parallel"), Path("d3"), "d3_images/, d3_pkl/ and d3_json/", _dod),
}


def combine(protocol: str, split: str, figures: Mapping[str, Figures], missing: Sequence[str]) -> Figures:
    """Of a protocol's parts the one result that is reported; `missing` names the parts whose files are not there."""
    if protocol == "odinw":
        return odinw.average(split, figures, missing)
    (only,) = figures.values()
    return only


# Images of the benchmarks that are often cut to a part; a published figure is not shown beside a part's.
PUBLISHED_IMAGES = {"coco val2017": 5_000, "lvis val1.0": 19_809}


def published_names(protocol: str, split: str) -> tuple[str, tuple[str, ...]]:
    """The zoo's name of a benchmark, and what our figures call its numbers; "" for a number of another split."""
    if protocol == "lvis":
        return ("lvis minival" if split == "minival" else "lvis val1.0"), ("AP", "APr", "APc", "APf")
    if protocol == "odinw":
        return f"odinw{split}", ("average AP",)
    if protocol == "dod":
        return "dod full", ("full AP", "") if split == "concat" else ("", "full AP")
    names = {"coco": ("AP",), "flickr30k": ("R@1", "R@5", "R@10"), "grefcoco": ("F1_score", "N_acc")}
    return f"{protocol} {split}", names[protocol]
