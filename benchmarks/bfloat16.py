"""One image and one sentence in bfloat16, beside our own float32 and transformers in bfloat16.

python -m benchmarks bfloat16 [--size swin_b] [--height 800] [--width 1333] [--rounds 3] [--threads 2]
"""

import tyro
from safetensors.torch import load_file

from benchmarks.race import Options, alternate, gib, peer_name, prepared, row


def main(options: Options) -> None:
    """Measure and print."""
    with prepared(options, "ours", "ours", "transformers") as ((half, exact, theirs), inputs):
        for side in (half, theirs):
            side.call("to_bfloat16")
        sides = {"bfloat16": half, "float32": exact, "transformers": theirs}
        results = {name: inputs.with_stem(f"answer_{name}") for name in sides}
        for name, side in sides.items():
            side.call("infer", inputs, results[name])
        measured = alternate(options.rounds, {name: lambda s=s: s.call("infer", inputs) for name, s in sides.items()})
        scores = {name: load_file(path)["scores"].sort(descending=True).values for name, path in results.items()}
    seconds = {name: of.seconds for name, of in measured.items()}
    print(options.heading(f"one {options.height}x{options.width} image, one sentence, in bfloat16"))
    print(row("ours", f"{seconds['bfloat16']:.2f} s, {gib(measured['bfloat16'].peak)}"))
    print(row("ours in float32", f"{seconds['float32']:.2f} s, {gib(measured['float32'].peak)}"))
    print(row(f"{peer_name()} in bfloat16", f"{seconds['transformers']:.2f} s, {gib(measured['transformers'].peak)}"))
    for name, target in (("float32", 2.5), ("transformers", 6.0)):
        ratio = seconds[name] / seconds["bfloat16"]
        print(row(f"times as fast as {name}", f"{ratio:.2f}", str(target), ratio >= target))
    for name in ("bfloat16", "transformers"):
        drift = (scores[name] - scores["float32"]).abs().max().item()
        print(row(f"sorted scores against float32: {name}", f"within {drift:.0e}"))


if __name__ == "__main__":
    main(tyro.cli(Options, default=Options(), description=__doc__))
