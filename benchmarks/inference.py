"""One image and one sentence: ours and transformers' in turn, and how near ours is to the matrix bound.

python -m benchmarks inference [--size swin_b] [--height 800] [--width 1333] [--rounds 5] [--threads 2]
"""

import tyro

from benchmarks.race import Options, alternate, gib, peer_name, prepared, row, warm_up


def main(options: Options) -> None:
    """Measure and print."""
    # Products are counted and timed by a third process: ours stays as large as it once was.
    with prepared(options, "ours", "transformers", "ours") as ((ours, theirs, products), inputs):
        same = warm_up(ours, theirs, inputs)
        flops = products.call("matrix_work", inputs, of="infer")["flops"]
        measured = alternate(
            options.rounds,
            {
                "ours": lambda: ours.call("infer", inputs),
                "addmm": lambda: products.call("matrix_rate"),
                "transformers": lambda: theirs.call("infer", inputs),
            },
        )
    mine, peer, rate = measured["ours"], measured["transformers"], measured["addmm"].median("addmm")
    bound = flops / rate
    ratio, share = peer.seconds / mine.seconds, bound / mine.seconds
    print(options.heading(f"one {options.height}x{options.width} image, one sentence"))
    print(row("ours", f"{mine.seconds:.2f} s"))
    print(row(peer_name(), f"{peer.seconds:.2f} s, {gib(peer.peak)}"))
    print(row("times as fast", f"{ratio:.2f}", "2.7", ratio >= 2.7))
    print(row("ours, peak", gib(mine.peak), "2.8 GiB", mine.peak <= 2.8 * 1024))
    work = f"{flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s of addmm = {bound:.2f} s"
    print(row("share of the matrix bound", f"{share:.0%} ({work})", "80 %", share >= 0.8))
    own = measured["addmm"].median("linear")
    reached = f"{flops / own / mine.seconds:.0%} ({own / 1e9:.0f} GFLOP/s: {flops / own:.2f} s)"
    print(row("the same at the rate of our linear layers alone", reached))
    print(row("agreement", same))


if __name__ == "__main__":
    main(tyro.cli(Options, default=Options(rounds=5), description=__doc__))
