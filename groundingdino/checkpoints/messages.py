"""Text from files in error messages: in one line, without control characters, never long."""

from collections.abc import Iterable
from itertools import islice


def printable(text: str, limit: int = 200) -> str:
    """The text with everything but printable ASCII escaped, cut after `limit` characters."""
    shown = text[: limit + 1].encode("unicode_escape").decode()
    return shown if len(shown) <= limit else shown[:limit] + "..."


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few names of many."""
    shown = [printable(name) for name in islice(names, limit + 1)]
    return ", ".join(shown[:limit]) + (", ..." if len(shown) > limit else "")
