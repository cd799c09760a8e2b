"""MDETR's RefCOCO json -> ODVG json lines, equal to mmdet's `tools/dataset_converters/refcoco2odvg.py`.

python -m groundingdino.data.convert finetune_refcoco_train.json finetune_refcoco_train_vg.json
"""

import json
import os
from pathlib import Path

from groundingdino.data.formats.mdetr import convert, read_document


def convert_file(source: Path, target: Path) -> tuple[int, list[str]]:
    """Write `target` whole or not at all.

    Returns:
        The number of lines written, and what was left out, one line each.
    Raises:
        ValueError: if `source` is missing or not in MDETR's format.
    """
    document = read_document(source)
    notes, lines = [], []
    try:
        for converted in convert(document):
            notes += [f"{source}: images entry {converted.number}: {problem}" for problem in converted.problems]
            if converted.line is not None:
                lines.append(json.dumps(converted.line, ensure_ascii=False) + "\n")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return len(lines), notes


def main(source: Path, target: Path, /) -> None:
    """Convert an MDETR annotation file to ODVG json lines, the format that training data is often kept in.

    Args:
        source: such as finetune_refcoco_train.json
        target: the file to write, such as finetune_refcoco_train_vg.json
    """
    try:
        written, notes = convert_file(source, target)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    for note in notes[:10]:
        print(f"left out: {note}")
    print(f"{written} lines written to {target}; {len(notes)} boxes or entries left out")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
