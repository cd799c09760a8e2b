"""The benchmarks by name: `python -m benchmarks` lists them, `python -m benchmarks NAME [options]` runs one."""

import runpy
import sys

BENCHMARKS = {
    "inference": ("inference", "one image and one sentence, beside transformers, and the share of the matrix bound"),
    "bfloat16": ("bfloat16", "one image in bfloat16, beside our float32 and transformers in bfloat16"),
    "compiled": ("compiled", "one image as torch compiles the model, beside the model as it is"),
    "sentences": ("sentences", "the evaluator at 7.5 sentences a photograph, beside transformers"),
    "training": ("training", "a training step with and without activation checkpointing, beside transformers"),
    "categories": ("categories", "80 and 1,203 names in one image"),
    "ms_deform_attn": ("ms_deform_attn", "deformable attention's kernel against the composite"),
    "contention": (
        "contention",
        "training, prediction and evaluation alone and beside a busy process",
    ),
    "scale": ("scale", "growth with image size, tokens, batch, sentences and ranks, as plots"),
    "counts": ("step_counts", "operators and host reads of a training step"),
    "data": ("data_loading", "images a second and core, large annotation files, memory of a loader worker"),
    "soak": ("soak", "memory of a process over ten thousand predictions of mixed sizes, as a plot"),
    "load": ("load_checkpoint", "seconds and memory to load a checkpoint"),
    "imports": ("imports", "seconds of `import groundingdino` beyond `import torch`"),
    "serve": ("serve", "the HTTP server: requests a second and latency at 1, 4 and 16 clients"),
    "random_checkpoint": ("random_checkpoint", "no benchmark: writes a full-size checkpoint in mmdet's format"),
}


def main() -> None:
    """Run the benchmark that the first argument names with the arguments behind it."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in BENCHMARKS:
        print("python -m benchmarks NAME [--help]\n")
        print("\n".join(f"  {key:18} {description}" for key, (_, description) in BENCHMARKS.items()))
        sys.exit(0 if name in ("", "-h", "--help") else f"\nthere is no benchmark {name!r}")
    sys.argv = [f"python -m benchmarks {name}", *sys.argv[2:]]
    runpy.run_module(f"benchmarks.{BENCHMARKS[name][0]}", run_name="__main__")


if __name__ == "__main__":
    main()
