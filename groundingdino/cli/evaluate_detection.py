"""`evaluate` of the protocols in the catalogue: COCO, LVIS, gRefCOCO, Flickr30k, ODinW, D-cube."""

import math
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groundingdino.cli.evaluate import Arguments, Session
    from groundingdino.evaluation import Evaluation
    from groundingdino.evaluation.catalogue import DescribedProtocol, Part, Request
    from groundingdino.evaluation.report import Figures


@dataclass(frozen=True)
class Scored:
    """One part that was evaluated."""

    name: str  # of its files
    protocol: "DescribedProtocol"
    evaluation: "Evaluation[Figures]"


def check(arguments: "Arguments") -> None:
    """Nothing is checked before the annotations are opened: each protocol says what it misses."""


def request_of(arguments: "Arguments") -> "Request":
    """The arguments as the catalogue takes them. ValueError for a split that the protocol does not have."""
    from groundingdino.evaluation.catalogue import CATALOGUE, Request
    from groundingdino.inference.vocabulary import read_vocabulary

    entry = CATALOGUE[arguments.name]
    split = arguments.split or entry.splits[0]
    if split not in entry.splits:
        raise ValueError(f"{arguments.name} has no split {split!r}: use one of {', '.join(entry.splits)}")
    root = arguments.data_root or entry.data_root
    images = root / arguments.images if arguments.images else None
    if arguments.names is not None and arguments.name != "coco":
        raise ValueError(f"--names gives the prompts of a COCO file's categories; {arguments.name} has its own")
    vocabulary = None if arguments.names is None else read_vocabulary(arguments.names)
    return Request(root, split, arguments.annotations, images, arguments.names_per_caption, vocabulary)


def evaluate(session: "Session") -> Generator[str, None, Path | None]:
    """Answer, score and write; yields the lines to print. Returns the report's file, in the main process."""
    from groundingdino.evaluation.catalogue import CATALOGUE, combine
    from groundingdino.runtime import distributed

    arguments, request = session.arguments, request_of(session.arguments)
    parts = CATALOGUE[arguments.name].parts(request)
    name = arguments.annotations.stem if arguments.annotations else f"{arguments.name}_{request.split}"
    if arguments.score is not None and len(parts) > 1:
        parts = tuple(part for part in parts if arguments.score.stem == f"{name}_{part.name}") or parts[:0]
    done: dict[str, Scored] = {}
    missing: dict[str, str] = {}
    for part in parts:
        try:
            protocol = part.load()
        except ValueError as error:
            missing[part.name] = str(error)
            continue
        done[part.name] = _answer(session, part, protocol, name if len(parts) == 1 else f"{name}_{part.name}")
    if not done:
        reason = next(iter(missing.values()), f"{arguments.score}: of none of its data sets")
        files = CATALOGUE[arguments.name].files
        raise ValueError(f"{reason}; {arguments.name} reads {files} below {request.data_root.absolute()} (--data-root)")
    if distributed.is_main():
        figures = combine(arguments.name, request.split, {n: s.evaluation.figures for n, s in done.items()}, [*missing])
        return (yield from _report(session, name, done, figures))
    return None


def _answer(session: "Session", part: "Part", protocol: "DescribedProtocol", name: str) -> Scored:
    from groundingdino.cli import evaluate as shared

    identity = {"protocol": f"{session.arguments.name} {part.name}", **protocol.description()}
    return Scored(name, protocol, shared.answer(session, protocol, name, identity))


def _report(session: "Session", name: str, done: dict[str, Scored], figures: "Figures") -> Generator[str, None, Path]:
    from groundingdino.cli import evaluate as shared
    from groundingdino.evaluation import report
    from groundingdino.evaluation.detection_misses import save_detection_misses

    arguments, request = session.arguments, request_of(session.arguments)
    first = next(iter(done.values()))
    run = first.evaluation.report()
    published = published_figures(session, figures, run["images"])
    content: dict[str, Any] = {
        "protocol_name": arguments.name,
        "split": request.split,
        "protocol": {**first.protocol.description(), **run.pop("protocol")},
        **figures.report(),
        **run,
        "published": published,
    }
    if len(done) > 1:
        content["parts"] = {n: s.evaluation.figures.report() | s.protocol.description() for n, s in done.items()}
        content["images"] = sum(scored.evaluation.images for scored in done.values())
        content["prompts"] = sum(scored.evaluation.prompts for scored in done.values())
        content["seconds"] = sum(scored.evaluation.seconds for scored in done.values())
    for scored in done.values():
        yield from shared.heading(session, scored.evaluation, f"prompts of {scored.name}")
    yield from (f"{key}: {text}" for key, text in first.protocol.description().items())
    yield from report.category_table(
        (category, None if math.isnan(ap) else ap) for category, ap in figures.per_category
    )
    yield from report.table(content["figures"], published)
    yield from (f"note: {note}" for note in figures.notes)
    written = shared.write_report(session, name, content)
    yield f"report: {written}"
    if arguments.save_pictures > 0:
        for scored in done.values():
            place = arguments.folder / f"{scored.name}_misses"
            answers = arguments.score or arguments.folder / f"{scored.name}.answers"
            saved = save_detection_misses(scored.protocol, answers, place, arguments.save_pictures)
            yield f"pictures: {len(saved)} images with misses in {place}, the worst first"
    return written


def published_figures(session: "Session", figures: "Figures", images: int) -> dict[str, float] | None:
    """Figures in percent of the same release, where they were measured as we did; None otherwise."""
    from groundingdino.checkpoints import zoo
    from groundingdino.cli import evaluate as shared
    from groundingdino.evaluation.catalogue import PUBLISHED_IMAGES, published_names
    from groundingdino.inputs.images import DEFAULT_SCALE

    arguments, request = session.arguments, request_of(session.arguments)
    same = session.options.scale == DEFAULT_SCALE and arguments.annotations is None and not figures.notes
    benchmark, names = published_names(arguments.name, request.split)
    same = same and images == PUBLISHED_IMAGES.get(benchmark, images)
    row = zoo.published(shared.release_of(session), benchmark)
    if not same or arguments.names_per_caption is not None or arguments.names is not None or row is None:
        return None
    return {name: value for name, value in zip(names, row, strict=False) if name}
