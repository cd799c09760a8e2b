"""Tables {their name: our name} with placeholders, read in both directions."""

import re
from collections.abc import Iterable
from functools import lru_cache

PATTERNS = {"i": r"\d+", "j": r"\d+", "p": "weight|bias"}  # {i}, {j}: an index; {p}: of a layer's two parameters


class KeyTable:
    """Renames by templates such as `"neck.convs.{i}.gn.{p}": "neck.projections.{i}.norm.{p}"`.

    Both sides of a row hold the same placeholders (see `PATTERNS`). A name fits at most one row, else ValueError.
    """

    def __init__(self, rows: dict[str, str]) -> None:
        self._to_ours = _compile(rows.items())
        self._to_theirs = _compile((ours, theirs) for theirs, ours in rows.items())
        self.ours = lru_cache(maxsize=4096)(lambda name: _rename(self._to_ours, name))
        self.theirs = lru_cache(maxsize=4096)(lambda name: _rename(self._to_theirs, name))


def _compile(rows: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    compiled = []
    for source, target in rows:
        parts = re.split(r"\{(\w)\}", source)  # text, placeholder, text, ...
        groups = [f"(?P<{part}>{PATTERNS[part]})" if at % 2 else re.escape(part) for at, part in enumerate(parts)]
        compiled.append((re.compile("".join(groups)), target))
    return compiled


def _rename(rows: list[tuple[re.Pattern[str], str]], name: str) -> str | None:
    hits = [target.format(**match.groupdict()) for pattern, target in rows if (match := pattern.fullmatch(name))]
    if len(hits) > 1:
        raise ValueError(f"{name!r} fits several rows of the key table: {hits}")
    return hits[0] if hits else None


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few names of many, for an error message: printable whatever the file holds."""
    names = [name.encode("unicode_escape").decode()[:200] for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
