"""Where downloaded and converted weights are kept, whether the network may be used, and locks between processes."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """GROUNDINGDINO_CACHE, or `groundingdino` in the user's cache folder. It may not exist yet."""
    own = os.environ.get("GROUNDINGDINO_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "groundingdino"


def is_offline() -> bool:
    """Whether GROUNDINGDINO_OFFLINE or HF_HUB_OFFLINE forbids the network."""
    names = ("GROUNDINGDINO_OFFLINE", "HF_HUB_OFFLINE")
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time: others wait until the block has ended. A process that dies gives the lock back.

    OSError where the lock file `path` cannot be made.
    """
    import fcntl  # not on Windows

    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
