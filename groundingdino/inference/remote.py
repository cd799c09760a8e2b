"""Files of object stores and other remote file systems, named by URIs such as s3://bucket/photos/, through fsspec."""

import io
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXTRA = 'pip install "groundingdino[remote]", or the package that the message names'


def is_uri(place: str | Path) -> bool:
    """Whether it names something that is not opened as a local file."""
    return "://" in str(place)


def file_system(uri: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it). ValueError for a protocol that is unknown or not installed."""
    import fsspec

    try:
        # Listings are not kept: they would grow with the number of images.
        return fsspec.core.url_to_fs(uri, use_listings_cache=False)  # type: ignore[no-any-return]
    except ImportError as error:
        raise ValueError(f"{uri}: {error}; {EXTRA}") from error
    except ValueError as error:
        raise ValueError(f"{uri}: {error}") from error


def path_of(uri: str) -> Path:
    """Where it would lie if all file systems were folders of one: s3://bucket/a -> /s3/bucket/a."""
    _, path = file_system(uri)
    return Path("/", uri.partition("://")[0], path.lstrip("/"))


def files_below(uri: str) -> Iterator[str]:
    """The URIs of the files below a folder, by name; hidden ones aside. ValueError if there is no such folder."""
    system, folder = file_system(uri)
    found = _asked(uri, lambda: system.find(folder))
    if not found:
        raise ValueError(f"{uri}: no such file or folder, or an empty one")
    for path in sorted(found):
        if not any(part.startswith(".") for part in posixpath.relpath(path, folder).split("/")):
            yield system.unstrip_protocol(path)


def open_remote(uri: str) -> io.BufferedIOBase:
    """The file, opened for reading; ranges of it are fetched as they are read. ValueError if it cannot be opened."""
    system, path = file_system(uri)
    return _asked(uri, lambda: system.open(path, "rb"))  # type: ignore[no-any-return]


def read_remote(uri: str, offset: int = 0, size: int | None = None) -> bytes:
    """The file's bytes, all or a range.

    Raises:
        ValueError: the file is missing or may not be read.
        OSError: the store does not answer.
    """
    system, path = file_system(uri)
    end = None if size is None else offset + size
    try:
        return _asked(uri, lambda: system.cat_file(path, start=offset or None, end=end))  # type: ignore[no-any-return]
    except ValueError as error:
        if isinstance(error.__cause__, (FileNotFoundError, PermissionError)):
            raise
        raise OSError(str(error)) from error


def upload(folder: Path, names: list[str], uri: str) -> None:
    """Copy files and subfolders of a folder, links as what they point to. ValueError, naming what was not written."""
    system, target = file_system(uri)
    for name in names:
        place = folder / name
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
                there = posixpath.join(target, path.relative_to(folder).as_posix())
                _asked(uri, lambda path=path, there=there: _put(system, path, there))  # type: ignore[misc]


def _put(system: Any, path: Path, there: str) -> None:
    system.makedirs(posixpath.dirname(there), exist_ok=True)
    system.put_file(str(path), there)


def _asked(uri: str, call: Any) -> Any:
    """What the store answers. Its errors are of many kinds (a client's own, not only OSError), so all are told."""
    try:
        return call()
    except Exception as error:
        raise ValueError(f"{uri}: {type(error).__name__}: {error}") from error
