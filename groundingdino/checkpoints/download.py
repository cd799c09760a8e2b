"""Download a file over HTTP: with a progress bar, resumed after a break, checked, and whole or not there."""

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, BinaryIO

from groundingdino.runtime.files import open_file

ATTEMPTS = 5  # without a single new byte; a connection that brings some starts the count again
PAUSE = 1.0  # seconds before the second attempt, doubled from one to the next
TIMEOUT = 30.0  # seconds without a byte
AT_ONCE = 2**20  # bytes
BROKEN = (urllib.error.URLError, http.client.HTTPException, OSError)


class DownloadError(ValueError):
    """The file could not be fetched: one line that says why."""


class _Break(Exception):
    """The network or the server gave way: worth another attempt."""


def download(url: str, target: Path, sha256: str = "") -> None:
    """Fetch `url` into `target`, which appears whole or not at all. What a break leaves is used by the next call.

    Args:
        sha256: hexadecimal, or the beginning of it, that the file must have; empty where it is not known.
    Raises:
        DownloadError: no network, an error of the server, another size than promised, or another hash.
        OSError: the file could not be written, e.g. on a full disk.
    """
    from tqdm import tqdm

    part = target.with_name(f"{target.name}.part")
    attempt = 0
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc=target.name, disable=None) as bar:
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                if _fetch_rest(url, part, bar):
                    break
                problem: object = "the connection broke off"
            except _Break as error:
                problem = error
            grown = part.exists() and part.stat().st_size > before
            attempt = 1 if grown else attempt + 1
            if attempt >= ATTEMPTS:
                raise DownloadError(f"{url}: could not be fetched ({problem})")
            time.sleep(PAUSE * 2 ** (attempt - 1))
    found = _sha256(part)
    if not found.startswith(sha256):
        part.unlink()
        raise DownloadError(f"{url}: what the server sent has SHA-256 {found}, expected {sha256}...: not kept")
    os.replace(part, target)


def _fetch_rest(url: str, part: Path, bar: Any) -> bool:
    """Append what is missing of the file. Whether it is whole now."""
    start = part.stat().st_size if part.exists() else 0
    try:
        answer = _open(url, start)
    except urllib.error.HTTPError as error:  # 416: nothing is missing, or the file there is shorter than what we have
        total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if total and int(total[1]) == start:
            return True
        part.unlink()
        return False
    with answer:
        appended = answer.status == 206
        length = answer.headers.get("Content-Length")
        promised = None if length is None or not length.isdecimal() else int(length) + (start if appended else 0)
        bar.reset(promised)
        bar.update(start if appended else 0)
        with open(part, "ab" if appended else "wb") as file:
            written = _copy(answer, file, bar)
            file.flush()
            os.fsync(file.fileno())
    size = written + (start if appended else 0)
    return promised is None or size == promised


def _open(url: str, start: int) -> Any:
    """The server's answer, from byte `start` on. HTTPError where it says that there is none (416)."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            raise
        if error.code < 500 and error.code not in (408, 429):
            raise DownloadError(f"{url}: the server answers {error.code} {error.reason}") from error
        raise _Break(error) from error
    except BROKEN as error:
        raise _Break(getattr(error, "reason", error)) from error


def _copy(answer: http.client.HTTPResponse, file: BinaryIO, bar: Any) -> int:
    """The number of bytes written. What came before a break is kept; a full disk is no break."""
    written = 0
    while True:
        try:
            data = answer.read1(AT_ONCE)
        except BROKEN as error:
            file.flush()
            raise _Break(error) from error
        if not data:
            return written
        file.write(data)
        written += len(data)
        bar.update(len(data))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_file(path) as file:
        while data := file.read(AT_ONCE):
            digest.update(data)
    return digest.hexdigest()
