"""Safetensors files, written atomically and read without a second copy in memory.

The format (8 bytes header length, JSON header, raw little-endian data) is the safetensors library's, and its files and
ours are interchangeable. Its own `save_file` copies every tensor once more and cannot flush to the disk; its reader
maps the file, so that overwriting a checkpoint in place would change or kill a running model. Ours streams both ways.
"""

import contextlib
import errno
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

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
HEADER_LIMIT = 100_000_000  # bytes, the safetensors library's own limit
ALIGNMENT = 64  # bytes; the header is padded with spaces so that tensor data starts aligned


@dataclass(frozen=True)
class Entry:
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
        raise ValueError(f"a safetensors header of {len(encoded)} bytes is over the format's limit of {HEADER_LIMIT}")
    return struct.pack("<Q", len(encoded)) + encoded


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends, and not before: other readers see the old file
    or the whole new one, also after a power cut. If the block fails, nothing is left behind.

    OSError (full disk, no permission, missing folder) says that `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        kept = "the file there is as it was" if path.exists() else "nothing was left there"
        raise OSError(error.errno, f"could not write {path} ({reason}); {kept}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Some file systems refuse to sync a folder; the rename is atomic there all the same."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, one tensor at a time: no second copy of the whole is made.

    Args:
        path: file to write or replace; its folder must exist.
        tensors: by name, any shape and device; stored contiguous.
        metadata: text by key, kept in the header.
    Raises:
        ValueError: a dtype that the format does not hold. OSError: see `atomic_file`.
    """
    header = _encode_header(tensors, metadata)
    with atomic_file(Path(path)) as file:
        file.write(header)
        for tensor in tensors.values():
            file.write(_bytes_of(tensor))


class TensorFile:
    """An open safetensors file: header in memory, tensors read when asked for. Use as a context manager.

    Raises ValueError that names the file where it is missing, truncated, or of another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise ValueError(f"{path}: no such file")
        if self.path.is_dir():
            raise ValueError(f"{path}: a folder, expected a .safetensors file")
        self._file = open(self.path, "rb")
        try:
            self.entries, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        size = os.fstat(self._file.fileno()).st_size
        start = self._file.read(9)
        length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
        if start[8:] != b"{" or not 2 <= length <= HEADER_LIMIT:
            raise ValueError(f"{self.path}: not a safetensors file ({size} bytes, begins with {start[:8]!r})")
        if 8 + length > size:
            raise ValueError(f"{self.path}: truncated safetensors file, {size} bytes hold not even its header")
        try:
            header = json.loads(b"{" + self._file.read(length - 1))
            metadata = header.pop("__metadata__", {})
            entries = {name: _entry(item, 8 + length) for name, item in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self.path}: damaged safetensors header ({error})") from error
        end = max((entry.stop for entry in entries.values()), default=8 + length)
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

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _entry(item: dict[str, Any], data_start: int) -> Entry:
    dtype = DTYPES[item["dtype"]]
    shape = tuple(int(n) for n in item["shape"])
    start, stop = item["data_offsets"]
    if start < 0 or min(shape, default=0) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape} and dtype {dtype} at bytes {start} to {stop}")
    return Entry(dtype, shape, data_start + start, data_start + stop)
