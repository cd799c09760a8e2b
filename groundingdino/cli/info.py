"""Say what a checkpoint is: size, provenance, config.

groundingdino info model.safetensors
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from groundingdino.cli import console, loading
from groundingdino.runtime.messages import printable


@dataclass(frozen=True)
class Arguments:
    """Which checkpoint, and in which form."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """a .safetensors file"""
    json: bool = False
    """as JSON"""


def describe(path: Path) -> dict[str, Any]:
    """Size, provenance and config of a checkpoint, from its header alone. ValueError where it is none."""
    import math

    loading.regular_file(path)
    from groundingdino.checkpoints.model_file import (
        CONFIG_KEY,
        SOURCE_KEY,
        VERSION_KEY,
        VOCABULARY_KEY,
        read_metadata,
        stored_config,
        stored_source,
    )
    from groundingdino.checkpoints.safetensors_file import TensorFile

    metadata = read_metadata(path)
    with TensorFile(path) as file:
        parameters = sum(math.prod(entry.shape) for entry in file.entries.values())
    known = {CONFIG_KEY, SOURCE_KEY, VERSION_KEY, VOCABULARY_KEY}
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "parameters": parameters,
        "format version": metadata.get(VERSION_KEY),
        "provenance": stored_source(path, metadata) or None,
        "vocabulary": metadata.get(VOCABULARY_KEY),
        "config": stored_config(path, metadata),
        **{key: value for key, value in metadata.items() if key not in known},
    }


def show(arguments: Arguments) -> int:
    """Print what `describe` says; names and values of the file cannot steer the terminal."""
    facts = describe(arguments.checkpoint)
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    facts["bytes"] = f"{facts['bytes']:,} ({facts['bytes'] / 2**20:.1f} MiB)"
    facts["parameters"] = f"{facts['parameters']:,} ({facts['parameters'] / 1e6:.1f} M)"
    facts["provenance"] = facts["provenance"] or "not recorded"
    print("\n".join(_lines(facts)))
    return 0


def _lines(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in facts.items():
        if isinstance(value, dict):
            yield f"{indent}{printable(key)}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{printable(key)}: {printable(value)}"


def main(arguments: Sequence[str], prog: str = "groundingdino info") -> int:
    """The exit code."""
    return console.run(prog, lambda: show(console.parse(Arguments, arguments, prog, description=__doc__)))
