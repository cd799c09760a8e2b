"""A labelling run on disk: what is labelled, by whom, and every raw score. Killed at any moment, it goes on.

The folder of a run holds

    manifest.json   what was asked of which model, written once
    images.jsonl    the images, one a line; `SHARD` of them are a shard
    shards/K.G      what worker number G of shard K found, one record an image, only ever appended to
    shards/K.done   an empty file: every image of the shard has its record

A worker claims a shard by creating K.0, which succeeds once. If it is killed, its file is no longer written to, and
another worker goes on in K.1 with the images that K.0 has no whole record of; so no file has two writers, and a record
that was cut off is passed over. A worker that was only slow may label an image again: the first record counts.
"""

import json
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from groundingdino.inference.image_source import ImageRef
from groundingdino.runtime.files import atomic_file, write_text

FRAME = struct.Struct("<II")  # before each record: its bytes, and their CRC-32
HEARTBEAT, STALE = 10.0, 90.0  # seconds: how often a claim is renewed; after how many it is void
WAIT = 0.5  # seconds until what others do is looked at again
SHARD = 256  # images


class Record(msgspec.Struct, frozen=True, array_like=True):
    """What was found in one image."""

    position: int  # in the list of images
    width: int = 0  # pixels of the upright image
    height: int = 0
    boxes: bytes = b""  # (K, 4) float32, xyxy in pixels
    scores: bytes = b""  # (K,) float32, falling
    labels: bytes = b""  # (K,) int32, index of the text
    problem: str = ""  # why the image could not be read


class Manifest(msgspec.Struct, frozen=True):
    """What a run is about. `asked` tells runs apart."""

    asked: dict[str, Any]
    images: int
    shard_size: int
    offsets: list[int]  # in images.jsonl, of each shard's first line


class Claim:
    """One worker's file of a shard."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file

    def append(self, record: Record) -> None:
        """Write a record in one piece."""
        payload = msgspec.msgpack.encode(record)
        self._file.write(FRAME.pack(len(payload), zlib.crc32(payload)) + payload)

    def beat(self) -> None:
        """Say that the worker lives."""
        os.utime(self.path)

    def close(self) -> None:
        """Everything on disk."""
        os.fsync(self._file.fileno())
        self._file.close()


@dataclass(frozen=True)
class Shard:
    """A claimed shard."""

    number: int
    claim: Claim
    waiting: tuple[tuple[int, ImageRef], ...]  # (position, image) without a record


class LabelRun:
    """A run's folder. Any number of processes, on any number of hosts that share it, have one each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shards = folder, folder / "shards"
        try:
            self.manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest)
        except OSError as error:
            raise ValueError(f"{folder}: no labelling run ({error.strerror}: manifest.json)") from error
        except msgspec.DecodeError as error:
            raise ValueError(f"{folder}/manifest.json: damaged ({error})") from error
        self._claims: dict[int, Claim] = {}

    @classmethod
    def create(
        cls, folder: Path, asked: Mapping[str, Any], images: Callable[[], Iterable[ImageRef]], shard_size: int = SHARD
    ) -> "LabelRun":
        """The run of a folder, begun if there is none; of several processes one lists the images.

        Raises:
            ValueError: no image; or the folder holds a run that asked for something else.
        """
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        manifest = folder / "manifest.json"
        once(folder / "shards", "list", manifest.exists, lambda: _write_manifest(folder, asked, images(), shard_size))
        run = cls(folder)
        wanted = json.loads(json.dumps(dict(asked)))
        for name in wanted:
            if run.manifest.asked.get(name) != wanted[name]:
                raise ValueError(
                    f"{folder} holds a run with {name} {_short(run.manifest.asked.get(name))}, not "
                    f"{_short(wanted[name])}: give another --out"
                )
        return run

    def claimed(self, numbers: Iterable[int]) -> Iterator[Shard]:
        """Those of the shards that are neither done nor being worked on, each claimed when it is asked for."""
        for number in numbers:
            if number in self._claims or self.is_done(number):
                continue
            claim = _claim(self.shards, f"{number:06d}")
            if claim is not None:
                self._claims[number] = claim
                yield Shard(number, claim, self.waiting(number))

    def waiting(self, number: int) -> tuple[tuple[int, ImageRef], ...]:
        """(position, image) of a shard's images that have no record."""
        recorded = {record.position for record in self._records(number)}
        return tuple((p, ref) for p, ref in self.refs(number) if p not in recorded)

    def finish(self, shard: Shard) -> None:
        """Every image of the shard has its record."""
        shard.claim.close()
        with atomic_file(self.shards / f"{shard.number:06d}.done"):
            pass
        del self._claims[shard.number]

    def is_done(self, number: int) -> bool:
        """Whether every image of a shard has its record."""
        return (self.shards / f"{number:06d}.done").exists()

    def done_images(self) -> int:
        """Images of the shards that are done."""
        total, size = self.manifest.images, self.manifest.shard_size
        done = [int(name[:6]) for name in os.listdir(self.shards) if name.endswith(".done") and name[:6].isdecimal()]
        return sum(min(size, total - number * size) for number in done)

    def refs(self, number: int) -> Iterator[tuple[int, ImageRef]]:
        """(position, image) of a shard."""
        first, size = number * self.manifest.shard_size, self.manifest.shard_size
        with open(self.folder / "images.jsonl", "rb") as lines:
            lines.seek(self.manifest.offsets[number])
            for position in range(first, min(first + size, self.manifest.images)):
                yield position, msgspec.json.decode(lines.readline(), type=ImageRef)

    def results(self, start: int = 0) -> Iterator[tuple[ImageRef, Record]]:
        """Every image from a position on that has a record, in the order of the list."""
        for number in range(start // self.manifest.shard_size, len(self.manifest.offsets)):
            found: dict[int, Record] = {}
            for record in self._records(number):
                found.setdefault(record.position, record)
            yield from ((ref, found[p]) for p, ref in self.refs(number) if p >= start and p in found)

    def heartbeat(self) -> "Heartbeat":
        """Renews the claims of this process while its `with` block runs."""
        return Heartbeat(lambda: list(self._claims.values()))

    def _records(self, number: int) -> Iterator[Record]:
        for generation in range(_generations(self.shards, f"{number:06d}")):
            yield from read_records(self.shards / f"{number:06d}.{generation}")


class Collector:
    """Appends records to a run that workers without its folder have found, in whatever order they come."""

    def __init__(self, run: LabelRun) -> None:
        self._run = run
        self._open: dict[int, tuple[Shard, set[int]]] = {}  # with the positions that have no record

    def add(self, record: Record) -> bool:
        """Whether it was new; not where its shard is done or being worked on by another process."""
        number = record.position // self._run.manifest.shard_size
        if number not in self._open:
            shard = next(self._run.claimed([number]), None)
            if shard is None:
                return False
            self._open[number] = shard, {position for position, _ in shard.waiting}
        shard, missing = self._open[number]
        if record.position not in missing:
            return False
        shard.claim.append(record)
        missing.remove(record.position)
        if not missing:
            self._run.finish(shard)
            del self._open[number]
        return True


class Heartbeat:
    """A thread that renews claims."""

    def __init__(self, claims: Callable[[], list[Claim]]) -> None:
        self._claims, self._end = claims, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(HEARTBEAT):
            for claim in self._claims():
                claim.beat()


def once(folder: Path, name: str, is_done: Callable[[], bool], work: Callable[[], None]) -> None:
    """`work` by one of all processes that come here; the others wait until it is done, or until that one has ended."""
    while not is_done():
        claim = _claim(folder, name)
        if claim is None:
            time.sleep(WAIT)
        else:
            _with_claim(folder, name, claim, lambda: None if is_done() else work())


def _with_claim(folder: Path, name: str, claim: Claim, work: Callable[[], None]) -> None:
    try:
        with Heartbeat(lambda: [claim]):
            work()
    finally:
        claim.close()
        for path in folder.glob(f"{name}.*"):
            path.unlink(missing_ok=True)


def read_records(path: Path) -> Iterator[Record]:
    """The whole records of one worker's file; what is cut off or damaged ends them."""
    with path.open("rb") as file:
        file.readline()
        while len(start := file.read(FRAME.size)) == FRAME.size:
            length, checksum = FRAME.unpack(start)
            payload = file.read(length)
            if len(payload) < length or zlib.crc32(payload) != checksum:
                return
            yield msgspec.msgpack.decode(payload, type=Record)


def _generations(folder: Path, name: str) -> int:
    """How many workers have claimed it so far."""
    count = 0
    while (folder / f"{name}.{count}").exists():
        count += 1
    return count


def _claim(folder: Path, name: str) -> Claim | None:
    """A new file for this worker; None where another one works on it, or was faster."""
    generation = _generations(folder, name)
    if generation and not _is_void(folder / f"{name}.{generation - 1}"):
        return None
    path = folder / f"{name}.{generation}"
    try:
        file = open(path, "xb", buffering=0)  # exclusive: of several workers one succeeds
    except FileExistsError:
        return None
    file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode() + b"\n")
    return Claim(path, file)


def _is_void(path: Path) -> bool:
    """Whether the worker of a claim has ended: its process is gone, or it has not renewed it for long.

    The age is taken from the file system's clock, as hosts' may differ.
    """
    try:
        with path.open("rb") as file:
            owner = json.loads(file.readline() or b"{}")
        renewed = path.stat().st_mtime
    except (OSError, ValueError):
        return False  # it is being written, or was removed: look again later
    if owner.get("host") == socket.gethostname() and (owner["process"] == os.getpid() or not _lives(owner["process"])):
        return True  # a number of our own was another process's before
    probe = path.with_name(f".clock-{socket.gethostname()}-{os.getpid()}")
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink(missing_ok=True)
    return now - renewed > STALE


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _write_manifest(folder: Path, asked: Mapping[str, Any], images: Iterable[ImageRef], shard_size: int) -> None:
    offsets, count, place = [], 0, 0
    with atomic_file(folder / "images.jsonl") as file:
        for ref in images:
            if count % shard_size == 0:
                offsets.append(place)
            place += file.write(msgspec.json.encode(ref) + b"\n")
            count += 1
        if not count:
            raise ValueError("no image was found in what is to be labelled")
    manifest = Manifest(json.loads(json.dumps(dict(asked))), count, shard_size, offsets)
    write_text(folder / "manifest.json", msgspec.json.encode(manifest).decode() + "\n")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
