"""Text from files, users and other programs in messages: in one line, without control characters, never long."""

from collections.abc import Iterable
from itertools import islice


def printable(text: object) -> str:
    """The text with all that is not printable escaped, line breaks too: it cannot steer a terminal."""
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def brief(text: object, limit: int = 200) -> str:
    """The printable text, cut after `limit` characters."""
    shown = printable(str(text)[: limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "..."


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few names of many."""
    shown = [brief(name) for name in islice(names, limit + 1)]
    return ", ".join(shown[:limit]) + (", ..." if len(shown) > limit else "")
