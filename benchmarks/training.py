"""A training step without the optimizer (forward, loss, backward): ours and transformers' in turn.

python -m benchmarks training [--size swin_b] [--height 640] [--width 853] [--rounds 3] [--threads 2]

Ours also computes the denoising queries and their losses, which transformers does not have.
"""

from dataclasses import dataclass
from functools import partial

import tyro

from benchmarks import race
from benchmarks.race import Measured, alternate, gib, peer_name, prepared, row, warm_up

LIMITS = {True: 4.2, False: 6.5}  # GiB with and without checkpointing
FASTER = 2.4  # times transformers, with checkpointing


@dataclass(frozen=True)
class Options(race.Options):
    """Checkpointing is of the backbone's blocks and the encoder's layers, on both sides.

    Args:
        plain_transformers: whether transformers runs without checkpointing, too; it needs 12 GiB at full size.
    """

    plain_transformers: bool = True


def rows(checkpointing: bool, measured: dict[str, Measured], flops: float | None) -> None:
    """Print one half of the table."""
    kind = "checkpointed" if checkpointing else "not checkpointed"
    mine, limit = measured["ours"], LIMITS[checkpointing]
    print(row(f"{kind}: ours", f"{mine.seconds:.1f} s"))
    if "transformers" in measured:
        peer = measured["transformers"]
        ratio = peer.seconds / mine.seconds
        print(row(f"{kind}: {peer_name()}", f"{peer.seconds:.1f} s, {gib(peer.peak)}"))
        target = (f"{FASTER}", ratio >= FASTER) if checkpointing else ("", None)
        print(row(f"{kind}: times as fast", f"{ratio:.2f}", *target))
    print(row(f"{kind}: ours, peak", gib(mine.peak), f"{limit} GiB", mine.peak <= limit * 1024))
    if flops is not None:
        rate = measured["addmm"].median("addmm")
        work = f"{flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s of addmm = {flops / rate:.1f} s"
        print(row(f"{kind}: share of the matrix bound", f"{flops / rate / mine.seconds:.0%} ({work})"))


def main(options: Options) -> None:
    """Measure and print."""
    results: dict[bool, tuple[dict[str, Measured], float | None]] = {}
    # Products are counted and timed by a third process: ours stays as large as it once was.
    with prepared(options, "ours", "transformers", "ours") as ((ours, theirs, products), inputs):
        same = warm_up(ours, theirs, inputs)
        for checkpointing in (True, False):
            flops = products.call("matrix_work", inputs, of="train", checkpointing=checkpointing)["flops"]
            calls = {
                "ours": partial(ours.call, "train", inputs, checkpointing=checkpointing),
                "addmm": partial(products.call, "matrix_rate"),
            }
            if checkpointing or options.plain_transformers:
                calls["transformers"] = partial(theirs.call, "train", inputs, checkpointing=checkpointing)
            alternate(1, calls)  # warms up all alike
            results[checkpointing] = alternate(options.rounds, calls), flops
    print(options.heading(f"training step with one {options.height}x{options.width} image"))
    for checkpointing, (measured, flops) in results.items():
        rows(checkpointing, measured, flops)
    print(row("agreement of the forward pass", same))


if __name__ == "__main__":
    main(tyro.cli(Options, default=Options(height=640, width=853), description=__doc__))
