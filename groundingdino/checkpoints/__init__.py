"""Weights: our files, everyone else's, releases by name, and the states of training runs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groundingdino.checkpoints.hub import resolve as resolve


def __getattr__(name: str) -> Any:
    if name == "resolve":  # imported when it is first used
        from groundingdino.checkpoints.hub import resolve

        return resolve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
