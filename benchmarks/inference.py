"""One image and one sentence: ours and transformers' in turn, and how near ours is to the matrix bound.

python -m benchmarks inference [--size swin_b] [--height 800] [--width 1333] [--rounds 5] [--threads 2]
"""

import tempfile
from pathlib import Path
from typing import Literal

import tyro

from benchmarks import workload
from benchmarks.race import agreement, alternate, gib, heading, row, workers


def main(
    size: Literal["swin_t", "swin_b", "swin_l"] = "swin_b",
    height: int = 800,
    width: int = 1333,
    rounds: int = 5,
    threads: int = 2,
) -> None:
    """Measure on the CPU.

    Args:
        size: of the model.
        height: of the image in pixels.
        width: of the image in pixels.
        rounds: the median is reported.
        threads: of torch.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload.write_models(folder, size)
        inputs = workload.write_inputs(folder / "inputs.safetensors", workload.sentences(1), height, width)
        with workers(folder, threads, "ours", "transformers") as (ours, theirs):
            files = [folder / "ours_result.safetensors", folder / "theirs_result.safetensors"]
            for worker, file in zip((ours, theirs), files, strict=True):  # warms up, too
                worker.call("infer", inputs, file)
            same = agreement(*files)
            flops = ours.call("matrix_work", inputs, of="infer")["flops"]
            measured = alternate(
                rounds,
                {
                    "ours": lambda: ours.call("infer", inputs),
                    "addmm": lambda: ours.call("matrix_rate"),
                    "transformers": lambda: theirs.call("infer", inputs),
                },
            )
    mine, peer, rate = measured["ours"], measured["transformers"], measured["addmm"].median("rate")
    bound = flops / rate
    ratio, share = peer.seconds / mine.seconds, bound / mine.seconds
    print(heading(f"{size}, one {height}x{width} image, one sentence, medians of {rounds} rounds", threads))
    print(row("ours", f"{mine.seconds:.2f} s"))
    print(row("transformers", f"{peer.seconds:.2f} s, {gib(peer.peak)}"))
    print(row("times as fast", f"{ratio:.2f}", "2.7", ratio >= 2.7))
    print(row("ours, peak", gib(mine.peak), "2.8 GiB", mine.peak <= 2.8 * 1024))
    work = f"{flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s of addmm = {bound:.2f} s"
    print(row("share of the matrix bound", f"{share:.0%} ({work})", "80 %", share >= 0.8))
    print(row("agreement", same))


if __name__ == "__main__":
    tyro.cli(main)
