"""The referring evaluator at 7.5 sentences a photograph, as in RefCOCO testA, beside transformers.

python -m benchmarks sentences [--size swin_b] [--height 800] [--width 1066] [--rounds 3] [--threads 2]

Ours computes the image half once for a photograph and asks its sentences in batches. transformers, used as its
documentation shows, gets the image anew with each sentence, so one sentence a round tells its speed.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro
from safetensors.torch import load_file

from benchmarks import race, workload
from benchmarks.race import TOLERANCE, alternate, gib, peer_name, prepared, row

COUNTS = (7, 8)  # sentences of two photographs
EXACT = 1e-5  # of scores, and of boxes as a share of the image's longer side


@dataclass(frozen=True)
class Options(race.Options):
    """The image is the photograph as resized.

    Args:
        batch_size: sentences that ours runs together; 1 is the evaluator's choice on a CPU.
        check: sentences that are also evaluated all together, to compare.
    """

    batch_size: int = 1
    check: int = 4


def one_by_one(batched: Path, alone: Path, extent: int) -> tuple[float, float, bool]:
    """Largest differences of scores, and of boxes of the same rank as a share of the image; whether both are small."""
    together, single = load_file(batched), load_file(alone)
    count = len(single["scores"])
    scores = (together["scores"][:count] - single["scores"]).abs().max().item()
    boxes = (together["boxes"][:count] - single["boxes"]).abs().max().item() / extent
    return scores, boxes, max(scores, boxes) < EXACT


def main(options: Options) -> None:
    """Measure and print."""
    captions, batch = workload.sentences(COUNTS[1]), options.batch_size
    with prepared(options, "ours", "transformers") as ((ours, theirs), inputs):
        batched, alone, peer = (inputs.with_stem(name) for name in ("batched", "alone", "peer"))
        photographs = {
            f"{count} sentences": partial(ours.call, "sentences", inputs, captions=captions[:count], batch_size=batch)
            for count in COUNTS
        }
        measured = alternate(options.rounds, {**photographs, "transformers": partial(theirs.call, "infer", inputs)})
        # Only now: a process stays as large as it once was, and several sentences at once need more memory.
        for file, together in ((batched, options.check), (alone, 1)):
            ours.call("sentences", inputs, file, captions=captions[: options.check], batch_size=together)
        theirs.call("infer", inputs, peer)
        expected = load_file(peer)["scores"][0].sort(descending=True).values
        first = load_file(batched)["scores"][0]
        apart = (first - expected[: len(first)]).abs().max().item()
        scores, boxes, exact = one_by_one(batched, alone, max(options.height, options.width))
    each = sum(measured[key].seconds for key in photographs) / sum(COUNTS)
    peak = max(measured[key].peak for key in photographs)
    theirs_each = measured["transformers"].seconds
    ratio = theirs_each / each
    photograph = f"{options.height}x{options.width} photographs with {sum(COUNTS) / len(COUNTS)} sentences"
    print(options.heading(f"{photograph}, {batch} at once"))
    print(row("ours", f"{each:.2f} s a sentence ({1 / each:.2f} a second), {gib(peak)}"))
    print(row(peer_name(), f"{theirs_each:.2f} s a sentence, {gib(measured['transformers'].peak)}"))
    print(row("times as fast", f"{ratio:.1f}", "6", ratio >= 6))
    difference = f"scores within {scores:.0e}, boxes within {boxes:.0e} of the image's size"
    print(row("batches against one by one", difference, f"{EXACT:.0e}", exact))
    same = f"scores within {apart:.0e}"
    print(row("first sentence against transformers", same, f"{TOLERANCE:.0e}", apart < TOLERANCE))


if __name__ == "__main__":
    main(tyro.cli(Options, default=Options(width=1066), description=__doc__))
