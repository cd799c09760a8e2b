"""The model as torch compiles it (`Predictor(compile=True)`) beside the model as it is: seconds to compile, and gain.

python -m benchmarks compiled [--size quickstart] [--height 320] [--width 416] [--rounds 5] [--threads 2]

Three processes: the model as it is, one that compiles with nothing in torch's cache on disk, and one that then starts
with the cache that this one has filled.
"""

import os
import tempfile

import tyro
from safetensors.torch import load_file

from benchmarks import workload
from benchmarks.race import Options, alternate, prepared, row

OPTIONS = Options(size="quickstart", height=320, width=416, rounds=5)


def main(options: Options) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        with prepared(options, "ours", "ours", "ours") as ((plain, compiled, later), inputs):
            upright = workload.write_inputs(
                inputs.with_stem("upright"), workload.sentences(1), options.width, options.height
            )
            plain.call("predict", inputs)
            first = {}
            for name, side in (("nothing", compiled), ("everything", later)):
                side.call("compile")
                first[name] = side.call("predict", inputs)["seconds"]
            another = compiled.call("predict", upright)["seconds"]
            sides = {"plain": plain, "compiled": compiled}
            results = {name: inputs.with_stem(f"answer_{name}") for name in sides}
            for name, side in sides.items():
                side.call("predict", inputs, results[name])
            measured = alternate(
                options.rounds, {name: lambda s=s: s.call("predict", inputs) for name, s in sides.items()}
            )
            scores = [load_file(path)["scores"] for path in results.values()]
    seconds = {name: of.seconds for name, of in measured.items()}
    print(options.heading(f"one {options.height}x{options.width} image, one sentence, compiled"))
    print(row("first image, nothing in torch's cache", f"{first['nothing']:.0f} s"))
    print(row("first image of a later process", f"{first['everything']:.0f} s"))
    print(row("first image of another shape", f"{another:.2f} s"))
    print(row("an image", f"{seconds['compiled']:.3f} s"))
    print(row("an image, not compiled", f"{seconds['plain']:.3f} s"))
    print(row("times as fast compiled", f"{seconds['plain'] / seconds['compiled']:.2f}"))
    apart = (scores[0] - scores[1]).abs().max().item()
    print(row("scores", f"within {apart:.0e}", "1e-4", apart < 1e-4))


if __name__ == "__main__":
    main(tyro.cli(Options, default=OPTIONS, description=__doc__))
