"""`evaluate --alpha`: a fine-tuned checkpoint mixed with the one it started from (WiSE-FT), from none of it to all."""

from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from groundingdino.cli import loading

if TYPE_CHECKING:
    from groundingdino.cli.evaluate import Arguments, Session

SHOWN = 4  # figures of a protocol, the most important first


def check(arguments: "Arguments") -> None:
    """ValueError where the flags do not go together."""
    if arguments.base is None or arguments.score is not None:
        raise ValueError("--alpha mixes --checkpoint with the weights it started from: name these with --base")
    outside = [alpha for alpha in arguments.alpha if not 0 <= alpha <= 1]
    if outside:
        raise ValueError(f"--alpha {outside[0]:g}: how much of the fine-tuned weights, from 0 to 1")
    if not loading.is_name(arguments.base):
        loading.regular_file(arguments.base)


def evaluate(session: "Session", kind: ModuleType) -> Iterator[str]:
    """Evaluate every mixture by the protocol of `kind`; yields the lines to print."""
    from groundingdino.checkpoints.merge import interpolate
    from groundingdino.checkpoints.model_file import load_detector
    from groundingdino.evaluation import report
    from groundingdino.runtime import distributed

    arguments = session.arguments
    assert arguments.base is not None
    base = load_detector(loading.resolved(arguments.base), session.world.device).state_dict()
    tuned = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    reports = {}
    for alpha in sorted(set(arguments.alpha)):
        session.model.load_state_dict(interpolate(base, tuned, alpha))
        folder = arguments.folder / f"alpha_{alpha:g}"
        mixture = f"{alpha:g} of it, the rest {arguments.base}"
        written = _end_of(kind.evaluate(replace(session, mixture=mixture, arguments=replace(arguments, output=folder))))
        if written is not None:
            yield f"alpha {alpha:g}: {written}"
            reports[alpha] = report.read_report(written)
    if distributed.is_main():
        figures = {alpha: content["figures"] for alpha, content in reports.items()}
        yield from report.mixture_table(figures, list(next(iter(figures.values())))[:SHOWN])
        yield f"curve: {report.plot_mixtures(figures, arguments.folder / 'alpha.png')}"


def _end_of(lines: Generator[str, None, Path | None]) -> Path | None:
    """Where an evaluation has written its report; its lines are not shown."""
    while True:
        try:
            next(lines)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
