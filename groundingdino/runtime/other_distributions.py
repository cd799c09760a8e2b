"""Other distributions that bring a package of this name, and would overwrite its files or be overwritten."""

import os
import re
import sys
from collections.abc import Iterable

OURS = "groundingdino"
LIKELY = re.compile(r"(?!groundingdino-)[a-z0-9_.]*ground(ing|ed)_?dino[a-z0-9_.]*-.*\.(dist|egg)-info", re.IGNORECASE)


def owners(folders: Iterable[str]) -> list[str]:
    """Names of the distributions in these folders, ours aside, that own files of a package `groundingdino`.

    Reads the folders' lists and the records of what is called after Grounding DINO: about a millisecond.
    """
    found = []
    for folder in folders:
        try:
            names = [name for name in os.listdir(folder or ".") if LIKELY.fullmatch(name)]
        except OSError:
            continue
        found += [name for name in names if _owns_package(os.path.join(folder, name))]
    return sorted({re.split("-", name)[0].replace("_", "-") for name in found})


def _owns_package(info: str) -> bool:
    for record in ("RECORD", "SOURCES.txt", "top_level.txt"):
        try:
            with open(os.path.join(info, record), encoding="utf-8") as file:
                if any(re.split(r"[/,\\]", line.strip())[0] == OURS for line in file):
                    return True
        except (OSError, UnicodeDecodeError):
            continue
    return False


def warning() -> str | None:
    """One line that says which distributions to uninstall; None where there is nothing to say."""
    others = owners(sys.path)
    if not others:
        return None
    return (
        f"{', '.join(others)} installed files into this package, too, and either may overwrite the other: "
        f"pip uninstall {' '.join(others)}, then install groundingdino again"
    )
