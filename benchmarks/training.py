"""A training step without the optimizer (forward, loss, backward): ours and transformers' in turn.

python -m benchmarks training [--size swin_b] [--height 640] [--width 853] [--rounds 3] [--threads 2]

Ours also computes the denoising queries and their losses, which transformers does not have.
"""

import tempfile
from pathlib import Path
from typing import Literal

import tyro

from benchmarks import workload
from benchmarks.race import Measured, agreement, alternate, gib, heading, row, workers

LIMITS = {True: 4.2, False: 6.5}  # GiB with and without checkpointing
FASTER = 2.4  # times transformers, with checkpointing


def rows(checkpointing: bool, measured: dict[str, Measured], flops: float | None) -> None:
    """Print one half of the table."""
    kind = "checkpointed" if checkpointing else "not checkpointed"
    mine, limit = measured["ours"], LIMITS[checkpointing]
    print(row(f"{kind}: ours", f"{mine.seconds:.1f} s"))
    if "transformers" in measured:
        peer = measured["transformers"]
        ratio = peer.seconds / mine.seconds
        print(row(f"{kind}: transformers", f"{peer.seconds:.1f} s, {gib(peer.peak)}"))
        target = (f"{FASTER}", ratio >= FASTER) if checkpointing else ("", None)
        print(row(f"{kind}: times as fast", f"{ratio:.2f}", *target))
    print(row(f"{kind}: ours, peak", gib(mine.peak), f"{limit} GiB", mine.peak <= limit * 1024))
    if flops is not None:
        rate = measured["addmm"].median("rate")
        work = f"{flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s of addmm = {flops / rate:.1f} s"
        print(row(f"{kind}: share of the matrix bound", f"{flops / rate / mine.seconds:.0%} ({work})"))


def main(
    size: Literal["swin_t", "swin_b", "swin_l"] = "swin_b",
    height: int = 640,
    width: int = 853,
    rounds: int = 3,
    threads: int = 2,
    plain_transformers: bool = True,
) -> None:
    """Measure on the CPU. Checkpointing is of the backbone's blocks and the encoder's layers, on both sides.

    Args:
        size: of the model.
        height: of the image in pixels.
        width: of the image in pixels.
        rounds: the median is reported.
        threads: of torch.
        plain_transformers: whether transformers runs without checkpointing, too; it needs 12 GiB at full size.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload.write_models(folder, size)
        inputs = workload.write_inputs(folder / "inputs.safetensors", workload.sentences(1), height, width)
        results: dict[bool, tuple[dict[str, Measured], float | None]] = {}
        with workers(folder, threads, "ours", "transformers") as (ours, theirs):
            files = [folder / "ours_result.safetensors", folder / "theirs_result.safetensors"]
            for worker, file in zip((ours, theirs), files, strict=True):
                worker.call("infer", inputs, file)
            same = agreement(*files)
            for checkpointing in (True, False):
                flops = ours.call("matrix_work", inputs, of="train", checkpointing=checkpointing)["flops"]
                calls = {
                    "ours": lambda on=checkpointing: ours.call("train", inputs, checkpointing=on),
                    "addmm": lambda: ours.call("matrix_rate"),
                }
                if checkpointing or plain_transformers:
                    calls["transformers"] = lambda on=checkpointing: theirs.call("train", inputs, checkpointing=on)
                results[checkpointing] = alternate(rounds, calls), flops
    print(heading(f"{size}, training step with one {height}x{width} image, medians of {rounds} rounds", threads))
    for checkpointing, (measured, flops) in results.items():
        rows(checkpointing, measured, flops)
    print(row("agreement of the forward pass", same))


if __name__ == "__main__":
    tyro.cli(main)
