"""Safetensors files, written atomically and read without a second copy in memory.

The format (8 bytes header length, JSON header, raw little-endian data) is the safetensors library's, and its files and
ours are interchangeable. Its own `save_file` copies every tensor once more and cannot flush to the disk; its reader
maps the file, so that overwriting a checkpoint in place would change or kill a running model. Ours streams both ways.
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundingdino.runtime import distributed
from groundingdino.runtime.files import atomic_file, open_file
from groundingdino.runtime.messages import brief

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
HEADER_LIMIT = 10_000_000  # bytes; that of the largest model has 150 kB, and parsing takes 30 times as much memory
ALIGNMENT = 64  # bytes; the header is padded with spaces so that tensor data starts aligned
CHECKSUM = "groundingdino.checksum"  # the last tensor of a file with one: CRC-32 of all bytes before it
READ_AT_ONCE = 2**22  # bytes
FLUSHED_AT_ONCE = 2**28  # bytes that are written between two flushes to the disk


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file
    stop: int


def _encode_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(
                f"tensor {name!r} has dtype {tensor.dtype}, which a safetensors file of ours does not hold"
            )
        stop = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(len(encoded) + 8) % ALIGNMENT)
    if len(encoded) > HEADER_LIMIT:
        raise ValueError(f"a safetensors header of {len(encoded)} bytes is over the limit of {HEADER_LIMIT}")
    return struct.pack("<Q", len(encoded)) + encoded


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], checksum: bool = False
) -> None:
    """Write a safetensors file atomically, one tensor at a time: no second copy of the whole is made.

    Args:
        path: file to write or replace; its folder must exist.
        tensors: by name, any shape and device; stored contiguous.
        metadata: text by key, kept in the header.
        checksum: end the file with a tensor that holds the CRC-32 of all before it, for `verify_checksum`.
    Raises:
        ValueError: a dtype that the format does not hold, or see `atomic_file`. OSError: see `atomic_file`.
    """
    last = {CHECKSUM: torch.empty(4, dtype=torch.uint8)} if checksum else {}
    header = _encode_header({**tensors, **last}, metadata)
    crc, unflushed = zlib.crc32(header), 0
    with atomic_file(Path(path)) as file:
        file.write(header)
        for tensor in tensors.values():
            data = _bytes_of(tensor)
            file.write(data)
            unflushed += len(data)
            if unflushed > FLUSHED_AT_ONCE:  # not all at the end, which on a slow disk would look like a hang
                file.flush()
                os.fsync(file.fileno())
                unflushed = 0
            distributed.note_progress()  # for the processes that wait until the file is there
            if checksum:
                crc = zlib.crc32(data, crc)
        if checksum:
            file.write(struct.pack("<I", crc))


class TensorFile:
    """An open safetensors file: header in memory, tensors read when asked for. Use as a context manager.

    Raises ValueError that names the file where it is missing, truncated, or of another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = open_file(self.path)
        try:
            self.entries, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> tuple[dict[str, StoredTensor], dict[str, str]]:
        size = os.fstat(self._file.fileno()).st_size
        start = self._file.read(9)
        length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
        if start[8:] != b"{" or not 2 <= length <= HEADER_LIMIT:
            raise ValueError(f"{self.path}: not a safetensors file ({size} bytes, begins with {start[:8]!r})")
        if 8 + length > size:
            raise ValueError(f"{self.path}: truncated safetensors file, {size} bytes hold not even its header")
        try:
            header = json.loads(b"{" + self._file.read(length - 1))
            metadata = _checked_metadata(header.pop("__metadata__", {}))
            entries = {name: _stored_tensor(name, item, 8 + length) for name, item in header.items()}
            end = _checked_layout(entries, 8 + length)
        except RecursionError:
            raise ValueError(f"{self.path}: damaged safetensors header (nested too deeply)") from None
        except ValueError as error:
            raise ValueError(f"{self.path}: damaged safetensors header ({brief(str(error))})") from error
        if end != size:
            state = "truncated" if size < end else "damaged"
            raise ValueError(f"{self.path}: {state} safetensors file, {size} bytes instead of {end}")
        return entries, metadata

    def read(self, name: str) -> Tensor:
        """One tensor, in fresh memory. KeyError for a name that is not in the file."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        view = tensor.reshape(-1).view(torch.uint8).numpy().data
        self._file.seek(entry.start)
        if self._file.readinto(view) != len(view):
            raise ValueError(f"{self.path}: truncated while it was read, at tensor {name!r}")
        return tensor

    def verify_checksum(self) -> None:
        """ValueError if the file has no checksum or was altered since it was written."""
        entry = self.entries.get(CHECKSUM)
        if entry is None:
            raise ValueError(f"{self.path}: has no checksum")
        crc = 0
        self._file.seek(0)
        for start in range(0, entry.start, READ_AT_ONCE):
            crc = zlib.crc32(self._file.read(min(READ_AT_ONCE, entry.start - start)), crc)
        if self._file.read() != struct.pack("<I", crc):
            raise ValueError(f"{self.path}: damaged or altered since it was written (its checksum differs)")

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _checked_metadata(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ValueError("__metadata__ is not an object of texts")
    return found


def _stored_tensor(name: str, item: Any, data_start: int) -> StoredTensor:
    """One entry of the header. ValueError where it has another form or contradicts itself."""
    if not isinstance(item, dict) or not {"dtype", "shape", "data_offsets"} <= item.keys():
        raise ValueError(f"{name!r} has no dtype, shape and data_offsets")
    shape, offsets = item["shape"], item["data_offsets"]
    if item["dtype"] not in list(DTYPES):
        raise ValueError(f"{name!r} has dtype {item['dtype']!r}, expected one of {', '.join(DTYPES)}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has shape {shape!r} at bytes {offsets!r}")
    dtype, (start, stop) = DTYPES[item["dtype"]], offsets
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} has shape {tuple(shape)} and dtype {dtype} at bytes {start} to {stop}")
    return StoredTensor(dtype, tuple(shape), data_start + start, data_start + stop)


def _are_counts(found: Any) -> bool:
    return isinstance(found, list) and all(type(n) is int and 0 <= n < 2**63 for n in found)


def _checked_layout(tensors: Mapping[str, StoredTensor], position: int) -> int:
    """The end of the last tensor. ValueError where two overlap or leave a gap: a small file would take much memory."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != position:
            raise ValueError(f"{name!r} begins at byte {tensor.start} of the file, the one before ends at {position}")
        position = tensor.stop
    return position
