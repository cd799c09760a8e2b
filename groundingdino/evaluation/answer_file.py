"""Answers on disk: an interrupted evaluation goes on from them, and figures are computed again without the model.

A file is one line of JSON, which says what the answers are to, and a record for each answer: image id, number of boxes,
then boxes, scores and labels, 24 bytes a box. Each process appends to a part of its own; when all is answered the main
process writes one file of all parts.
"""

import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from groundingdino.evaluation.answers import ImageAnswer
from groundingdino.runtime import distributed

RECORD = struct.Struct("<qi")  # image id, number of boxes
BYTES_PER_BOX = 24
ANSWERS_PER_MESSAGE = 500  # between processes


class AnswerStore:
    """The answers of one evaluation; under torchrun every process has one of the same path.

    Args:
        path: of the file that is left at the end; parts are beside it. None: nothing is left.
        identity: what the answers are to (checkpoint, protocol, image size); answers of another identity are refused.
        resume: keep the answers that an interrupted evaluation left; without it they are removed.

    Raises:
        ValueError: if there are answers to go on from, but of another identity.
    """

    def __init__(
        self, path: Path | None = None, identity: Mapping[str, Any] | None = None, resume: bool = False
    ) -> None:
        self.identity = dict(identity or {})
        self._temporary = None if path is not None else tempfile.TemporaryDirectory(prefix="answers-")
        self.path = path or Path(str(self._temporary and self._temporary.name)) / "answers"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rank = distributed.rank()
        own = [part for part in self._parts() if self._number(part) % distributed.world_size() == rank]
        if not resume:
            for part in own:
                part.unlink()
            own = []
        if resume and self.path.exists() and distributed.is_main():
            own.insert(0, self.path)
        self._part = self.path.with_name(f"{self.path.name}.part{rank}")
        self._sources = list(dict.fromkeys([*own, self._part]))
        for source in own:
            _check_identity(source, self.identity)
        self._file = _open_for_append(self._part, self.identity)
        distributed.barrier()  # no process removes parts that another already writes

    def __enter__(self) -> "AnswerStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def answered(self) -> frozenset[int]:
        """Image ids that have an answer, in any process's part; the same on every process."""
        mine = {image_id for source in self._sources for image_id in _image_ids(source)}
        return frozenset().union(*distributed.gather_objects(mine))

    def write(self, answers: Sequence[ImageAnswer]) -> None:
        """Append the answers about one image; they are on disk when this returns, as far as the system is concerned."""
        self._file.write(b"".join(map(_encode, answers)))
        self._file.flush()

    def gathered(self) -> Iterator[ImageAnswer]:
        """On the main process every process's answers, each image id once; on the others nothing, but they iterate too.

        When the iterator ends, `path` holds all answers and the parts are gone.
        """
        seen: set[int] = set()
        whole = self.path.with_name(f"{self.path.name}.whole")
        with whole.open("wb") if distributed.is_main() else open(os.devnull, "wb") as file:
            file.write(_header(self.identity))
            for answer in self._all_answers():
                if answer.image_id not in seen:
                    seen.add(answer.image_id)
                    file.write(_encode(answer))
                    yield answer
        if distributed.is_main():
            whole.replace(self.path)
        distributed.barrier()
        for source in self._sources:
            if source != self.path:
                source.unlink()

    def _all_answers(self) -> Iterator[ImageAnswer]:
        """Rank after rank; a rank other than the main one sends its answers and gets none."""
        for rank in range(distributed.world_size()):
            own = (
                (a for source in self._sources for a in read_answers(source)[1])
                if rank == distributed.rank()
                else iter(())
            )
            if rank == 0:
                yield from own
                continue
            while message := distributed.broadcast_object(list(islice(own, ANSWERS_PER_MESSAGE)), rank):
                if distributed.is_main():
                    yield from message

    def _parts(self) -> list[Path]:
        parts = self.path.parent.glob(f"{self.path.name}.part*")
        return sorted((part for part in parts if part.suffix[5:].isdigit()), key=self._number)

    @staticmethod
    def _number(part: Path) -> int:
        return int(part.suffix[5:])


def read_answers(path: Path) -> tuple[dict[str, Any], Iterator[ImageAnswer]]:
    """What the answers of a file are to, and the answers one by one; a record that was cut off ends them.

    Raises:
        ValueError: naming the file, if it is missing or of another kind.
    """
    return _read_header(path), _read_records(path)


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline(1 << 20))
        return dict(header["answers"])
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a file of answers") from error


def _read_records(path: Path) -> Iterator[ImageAnswer]:
    with path.open("rb") as file:
        file.readline()
        while len(start := file.read(RECORD.size)) == RECORD.size:
            image_id, count = RECORD.unpack(start)
            body = file.read(BYTES_PER_BOX * count)
            if len(body) < BYTES_PER_BOX * count:
                return
            numbers = np.frombuffer(body, "<f4", 5 * count).copy()
            labels = np.frombuffer(body, "<i4", count, 20 * count).astype(np.int64)
            yield ImageAnswer(image_id, numbers[: 4 * count].reshape(count, 4), numbers[4 * count :], labels)


def _image_ids(path: Path) -> Iterator[int]:
    """Of the whole records, without reading their boxes."""
    for image_id, _ in _records(path):
        yield image_id


def _records(path: Path) -> Iterator[tuple[int, int]]:
    """Image id and end, in bytes, of each whole record."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.readline()
        while len(start := file.read(RECORD.size)) == RECORD.size:
            image_id, count = RECORD.unpack(start)
            end = file.tell() + BYTES_PER_BOX * count
            if end > size:
                return
            yield image_id, end
            file.seek(end)


def _encode(answer: ImageAnswer) -> bytes:
    columns = np.asarray(answer.boxes, "<f4"), np.asarray(answer.scores, "<f4"), np.asarray(answer.labels, "<i4")
    return RECORD.pack(answer.image_id, len(answer.scores)) + b"".join(column.tobytes() for column in columns)


def _header(identity: Mapping[str, Any]) -> bytes:
    return json.dumps({"answers": dict(identity)}).encode() + b"\n"


def _check_identity(path: Path, identity: Mapping[str, Any]) -> None:
    found, wanted = _read_header(path), json.loads(json.dumps(dict(identity)))
    for name in {**found, **wanted}:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{path} holds answers with {name} {found.get(name)!r}, not {wanted.get(name)!r}: start without "
                "--resume, or give another --output"
            )


def _open_for_append(path: Path, identity: Mapping[str, Any]) -> BinaryIO:
    """A part, behind its last whole record."""
    if not path.exists():
        path.write_bytes(_header(identity))
    with path.open("rb") as file:
        end = len(file.readline())
    end = max([end, *(record_end for _, record_end in _records(path))])
    opened = path.open("r+b")
    opened.truncate(end)
    opened.seek(end)
    return opened
