"""Average checkpoints of one model, e.g. a fine-tuned one with what it started from, against forgetting; add adapters.

    groundingdino merge pretrained.safetensors finetuned.safetensors OUT.safetensors --alpha 0.5
    groundingdino merge a.safetensors b.safetensors c.safetensors OUT.safetensors
    groundingdino merge pretrained.safetensors adapter.safetensors OUT.safetensors

Exit code 2: something that you can fix, in one line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from groundingdino.cli import console


@dataclass(frozen=True)
class Arguments:
    """What to average, and where to."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT... OUT")]
    """two or more checkpoints, or names of releases, or one of them and adapters; and the file to write"""
    alpha: float | None = None
    """of two: how much of the second, from 0 to 1; default: all count alike, and adapters in full"""


def merge(arguments: Arguments) -> int:
    """Write the average. The exit code."""
    if len(arguments.files) < 3:
        raise ValueError("name two checkpoints or more, and the file to write")
    *names, target = arguments.files
    alpha = arguments.alpha
    if alpha is not None and (len(names) != 2 or not 0 <= alpha <= 1):
        raise ValueError(f"--alpha {alpha} mixes two checkpoints, by a number from 0 to 1")
    if any(target.exists() and name.exists() and target.samefile(name) for name in names):
        raise ValueError(f"{target} is one of those that are read: name another file to write")
    from groundingdino import checkpoints
    from groundingdino.checkpoints import merge
    from groundingdino.checkpoints.adapter import is_adapter

    base, *others = names
    if all(map(is_adapter, others)):
        weight = 1.0 if alpha is None else alpha
        merge.merge_adapter_files(checkpoints.resolve(base), others, target, weight)
        print(f"wrote {target}: {base}" + "".join(f" + {weight:.3g} x adapter {name}" for name in others))
        return 0
    share = [1 / len(names)] * len(names) if alpha is None else [1 - alpha, alpha]
    merge.merge([checkpoints.resolve(name) for name in names], target, share)
    print(f"wrote {target}: " + " + ".join(f"{s:.3g} x {name}" for name, s in zip(names, share, strict=True)))
    return 0


def main(arguments: Sequence[str], prog: str = "groundingdino merge") -> int:
    """The exit code."""
    return console.run(prog, lambda: merge(console.parse(Arguments, arguments, prog, description=__doc__)))
