"""Files that appear whole or not at all, and files that are opened without waiting. The project's one atomic write."""

import contextlib
import errno
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends, and not before.

    Other readers see the old file or the whole new one, also after a power cut. A file that is replaced keeps its
    permissions. If the block fails, nothing is left behind.

    Raises:
        ValueError: `path` is a folder, a device or a pipe.
        OSError: full disk, no permission, no such folder; the message says that `path` is as it was.
    """
    try:
        found = path.stat()
    except OSError:  # nothing there yet, or a folder that may not be searched: opening the new file says which
        mode = None
    else:
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} is {_kind(found.st_mode)}; name a file to write")
        mode = stat.S_IMODE(found.st_mode)
    temporary = _temporary(path)
    try:
        # O_EXCL neither follows a link nor opens what someone else has put there.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        with open(os.open(temporary, flags, 0o666 if mode is None else 0o600), "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; raises what `atomic_file` raises."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when the block ends. If the block fails, nothing is left behind.

    OSError where `path` exists and is not an empty folder, or cannot be written.
    """
    temporary = _temporary(path)
    try:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def leftovers(path: Path) -> list[Path]:
    """What writers of `path` left beside it that were killed before they ended."""
    return [p for p in path.parent.glob(".*.tmp") if p.name.startswith(f".{path.name}.")]


def open_file(path: Path) -> io.BufferedReader:
    """A regular file, open for reading. Does not wait, whatever lies there.

    ValueError in one line for a missing file, a folder, a pipe, a socket or a device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except ValueError:  # a NUL in the name
        raise ValueError(f"{str(path)!r} cannot be the name of a file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened ({error.strerror})") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise ValueError(f"{path}: {_kind(mode)}, expected a file")
    return open(descriptor, "rb")


def _explained(error: OSError, path: Path) -> OSError:
    reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
    kept = "what is there is as it was" if path.exists() else "nothing was left there"
    return OSError(error.errno, f"could not write {path} ({reason}); {kept}")


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"


def _temporary(path: Path) -> Path:
    """A name that nobody can have prepared; `leftovers` knows it by its form."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Some file systems refuse to sync a folder; the rename is atomic there all the same."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
