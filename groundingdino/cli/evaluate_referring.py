"""`evaluate` of referring expressions: Precision@1/5/10 and a class-agnostic AP of RefCOCO, RefCOCO+ and RefCOCOg."""

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groundingdino.cli.evaluate import Arguments, Session

SPLITS = {
    "refcoco": ("val", "testA", "testB"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
    "refexp": ("val",),
}


def root(arguments: "Arguments") -> Path:
    """Where the data is."""
    return arguments.data_root or Path("refcoco")


def images(arguments: "Arguments") -> Path:
    """The folder of the images."""
    return root(arguments) / (arguments.images or "train2014")


def split(arguments: "Arguments") -> str:
    """The one asked for, or the first."""
    return arguments.split or SPLITS[arguments.name][0]


def annotation_file(arguments: "Arguments") -> Path:
    """Where the expressions are."""
    stem = "final_refexp_val" if arguments.name == "refexp" else f"finetune_{arguments.name}_{split(arguments)}"
    return arguments.annotations or root(arguments) / "mdetr_annotations" / f"{stem}.json"


def check(arguments: "Arguments") -> None:
    """ValueError, one line about how to get it, if the data is missing."""
    needed = (annotation_file(arguments),) if arguments.score else (images(arguments), annotation_file(arguments))
    lost = [str(path) for path in needed if not path.exists()]
    if lost:
        raise ValueError(
            f"data not found: {', '.join(lost)} (looked below {root(arguments).absolute()}); "
            "images: COCO train2014 (http://images.cocodataset.org/zips/train2014.zip), "
            "annotations: MDETR's mdetr_annotations.tar.gz (https://zenodo.org/records/4729015); "
            "another place: --data-root DIR"
        )


def evaluate(session: "Session") -> Generator[str, None, Path | None]:
    """Answer, score and write; yields the lines to print. Returns the report's file, in the main process."""
    from groundingdino.cli import evaluate as shared
    from groundingdino.data import load_expressions
    from groundingdino.evaluation import ReferringProtocol, floor, referring
    from groundingdino.evaluation.misses import save_misses
    from groundingdino.runtime import distributed

    arguments = session.arguments
    path, folder = annotation_file(arguments), images(arguments)
    expressions = load_expressions(path)
    name = arguments.annotations.stem if arguments.annotations else f"{arguments.name}_{split(arguments)}"
    protocol = ReferringProtocol(expressions, folder, arguments.scoring)
    identity = {"protocol": f"{arguments.name} {split(arguments)}, {path.name}, scoring {arguments.scoring}"}
    evaluation = shared.answer(session, protocol, name, identity)
    if not distributed.is_main():
        return None
    release, scale = shared.release_of(session), evaluation.options.scale
    report = referring.report(evaluation)
    values = {f"{data_set} P@{k}": p for data_set, row in report["precision"].items() for k, p in row.items()}
    content = {
        "protocol_name": arguments.name,
        "split": split(arguments),
        "annotations": str(path),
        **report,
        "figures": {**values, "AP": report["average_precision"]},
        "published": {data_set: published_row(arguments, scale, release, data_set) for data_set in report["precision"]},
    }
    if arguments.floor:
        content["floor"] = floor.floors(expressions)
    yield from shared.heading(session, evaluation, "expressions")
    yield from table(content, split(arguments))
    written = shared.write_report(session, name, content)
    yield f"report: {written}"
    if arguments.save_pictures > 0:
        place = arguments.folder / f"{name}_misses"
        saved = save_misses(expressions, evaluation.figures.answers, folder, place, arguments.save_pictures)
        yield f"pictures: {len(saved)} of the misses in {place}, the worst first"
    return written


def published_row(
    arguments: "Arguments", scale: tuple[int, int], release: str | None, data_set: str
) -> list[float] | None:
    """Published Precision@1/5/10 in percent where they were measured as we did: same split, scoring and image size."""
    from groundingdino.checkpoints.zoo import published
    from groundingdino.inputs.images import DEFAULT_SCALE

    same = arguments.scoring == "max" and scale == DEFAULT_SCALE
    row = published(release, f"{data_set} {split(arguments)}") if same and arguments.annotations is None else None
    return list(row) if row else None


def table(content: dict[str, Any], part: str) -> list[str]:
    """The figures in percent, a line a data set, the published ones and the floors below."""
    lines = [f"scoring {content['protocol']['scoring']}", f"{'':28}{'P@1':>8}{'P@5':>8}{'P@10':>8}{'AP':>8}"]
    for name, row in content["precision"].items():
        figures = [100 * row[k] for k in ("1", "5", "10")]
        average = f"{100 * content['average_precision']:8.2f}" if len(content["precision"]) == 1 else f"{'':8}"
        lines.append(f"{f'{name} {part}, measured':28}" + "".join(f"{x:8.2f}" for x in figures) + average)
        published = content["published"][name]
        if published:
            lines.append(f"{f'{name} {part}, published':28}" + "".join(f"{x:8.1f}" for x in published))
        for way, floors in content.get("floor", {}).items():
            lines.append(f"{f'{name} {part}, {way}':28}{100 * floors[name]:8.2f}")
    if len(content["precision"]) > 1:
        lines.append(f"{'all together':28}{'':24}{100 * content['average_precision']:8.2f}")
    return lines
