"""Read what `torch.save` wrote, without torch.load and without ever running pickled code.

A pickle is a program: it names functions and calls them. Here the few names that rebuild tensors get our own
rebuilders; every other name (mmengine's HistoryBuffer, numpy scalars, `os.system`) becomes an inert class that swallows
what is done to it. So nothing is imported, nothing runs, and a checkpoint opens without the packages it was made with.
Tensors are views of the memory-mapped file: opening costs no memory, reading costs what is read.
"""

import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # torch.save before 1.6 wrote a bare pickle that starts so
BEGINNINGS = {
    b"\x89HDF": "an HDF5 file (Keras?)",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"BZh": "a bzip2 archive: unpack it first",
    b"\xfd7zXZ": "an xz archive: unpack it first",
    b"ustar": "a tar archive: unpack it first",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: fetch it with git lfs pull",
    b"<": "an HTML or XML page, probably of a failed download",
    b"\x93NUMPY": "a numpy array",
    **{bytes((0x80, protocol)): "a bare pickle" for protocol in range(2, 6)},
}


class Inert:
    """Stands in for an object whose class is not ours to load. Whatever the pickle does to it has no effect."""

    name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None:
        """What a pickled list subclass expects; as `extend` and `add`, it keeps nothing."""

    extend = add = append

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        """A method fetched by its name, for instance."""
        return self

    def __repr__(self) -> str:
        return f"<{self.name}, not loaded>"


class _Function:
    """A rebuilder as a pickle sees it: callable, without attributes that a pickle could set."""

    __slots__ = ("_run",)

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)


@dataclass(frozen=True)
class PytorchFile:
    """The content of a file, and what in it was left alone."""

    content: Any  # nested dicts, lists, tuples, plain values, tensors (views of the mapped file) and `Inert` objects
    inert: tuple[str, ...]  # qualified names that the pickle asked for and did not get, sorted


def read_pytorch_file(path: Path) -> PytorchFile:
    """Open a .pth file.

    Raises:
        ValueError: one line that says what the file is instead: missing, a folder, truncated, legacy, HTML, ...
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path}: a folder")
    with open(path, "rb") as file:
        start = file.read(512)
    if start[:2] != b"PK":
        raise ValueError(f"{path}: {describe_beginning(start, path.stat().st_size)}")
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(path, archive)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError) as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path}: truncated or damaged PyTorch file ({size} bytes, {error}); fetch it again"
        ) from error


def describe_beginning(start: bytes, size: int) -> str:
    """What a file that is not a zip archive seems to be, from its first 512 bytes."""
    if size == 0:
        return "an empty file"
    if LEGACY_MAGIC in start[:32]:
        return (
            "a PyTorch file in the format before PyTorch 1.6; rewrite it once with "
            "torch.save(torch.load(path, weights_only=True), new_path)"
        )
    stripped = start.lstrip()
    for magic, meaning in BEGINNINGS.items():
        if stripped.startswith(magic) or (magic == b"ustar" and start[257:262] == magic):
            return meaning
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return f"a text file that begins with {start[:40]!r}"
    return f"not a PyTorch file ({size} bytes, begins with {start[:8]!r})"


def _read_archive(path: Path, archive: zipfile.ZipFile) -> PytorchFile:
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        kind = (
            "a TorchScript archive" if any(n.endswith("/constants.pkl") for n in archive.namelist()) else "a zip file"
        )
        raise ValueError(f"{path}: {kind} without the one data.pkl of a PyTorch checkpoint")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError(f"{path}: saved on a big-endian machine, which is not supported")
    program = archive.read(pickles[0])
    reader = _Reader(io.BytesIO(program), _Storages(path, archive, f"{root}data/"))
    try:
        _check_sizes(program)
        content = reader.load()
    except zipfile.BadZipFile:
        raise
    except Exception as error:  # a damaged or hostile pickle can fail in any way; none of them is ours to debug
        reason = str(error).encode("unicode_escape").decode()[:200]  # may quote the file: no control characters
        raise ValueError(f"{path}: damaged PyTorch file, its pickle cannot be read ({reason})") from error
    return PytorchFile(content, tuple(sorted(reader.inert)))


def _check_sizes(program: bytes) -> None:
    """Refuse sizes that the bytes do not back: the C unpickler would allocate them first and then find out."""
    for opcode, argument, _ in pickletools.genops(program):  # itself refuses strings longer than what is left
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(program):
            raise ValueError(f"place {argument} in a memo of a {len(program)}-byte pickle")


class _Storages:
    """Byte ranges of the archive as 1-D uint8 tensors. Nothing is read until a tensor is used."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, prefix: str) -> None:
        self._archive, self._prefix = archive, prefix
        with open(path, "rb") as file:
            # Private copy-on-write pages: torch wants writable memory, and nobody may change the user's file.
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def bytes_of(self, key: str) -> Tensor:
        try:
            entry = self._archive.getinfo(self._prefix + key)
        except KeyError:
            raise zipfile.BadZipFile(f"tensor data {key!r} is missing") from None
        if entry.file_size == 0:
            return torch.empty(0, dtype=torch.uint8)
        if entry.compress_type != zipfile.ZIP_STORED:  # torch never compresses; someone has zipped it again
            return torch.frombuffer(bytearray(self._archive.read(entry)), dtype=torch.uint8)
        header = self._mapped[entry.header_offset : entry.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile(f"no file header at byte {entry.header_offset}")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start = entry.header_offset + 30 + name_length + extra_length
        if start + entry.file_size > len(self._mapped):
            raise zipfile.BadZipFile(f"tensor data {key!r} ends after the file")
        return torch.frombuffer(self._mapped, dtype=torch.uint8, count=entry.file_size, offset=start)


class _Reader(pickle.Unpickler):
    """`find_class` is the only way from a pickle to code, and here it leads nowhere."""

    def __init__(self, stream: Any, storages: _Storages) -> None:
        super().__init__(stream, encoding="latin1")
        self.inert: set[str] = set()
        self._storages = storages
        self._functions = {
            "torch._utils._rebuild_tensor_v2": _Function(_rebuild_tensor),
            "torch._utils._rebuild_tensor_v3": _Function(_rebuild_tensor_with_dtype),
            "torch._utils._rebuild_parameter": _Function(lambda tensor, *_: tensor),
            "torch._utils._rebuild_parameter_with_state": _Function(lambda tensor, *_: tensor),
            "torch._tensor._rebuild_from_type_v2": _Function(_rebuild_from_type),
        }

    def find_class(self, module: str, name: str) -> Any:
        qualified = f"{module}.{name}"
        if qualified in self._functions:
            return self._functions[qualified]
        if qualified == "collections.OrderedDict":
            return OrderedDict
        if module in ("torch", "torch.storage") and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        self.inert.add(qualified)
        return type("Inert", (Inert,), {"name": qualified})

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _device, _numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError(f"unknown reference {pid!r}")
        data = self._storages.bytes_of(key)
        return data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if math.prod(size) > storage.numel():
        raise ValueError(f"a tensor of shape {tuple(size)} over {storage.numel()} stored values")
    return storage.as_strided(size, stride, offset)  # raises where it would leave the storage


def _rebuild_tensor_with_dtype(
    storage: Tensor,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    _requires_grad: bool,
    _hooks: Any,
    dtype: torch.dtype,
    *_: Any,
) -> Tensor:
    return _rebuild_tensor(storage.view(torch.uint8).view(dtype), offset, size, stride)


def _rebuild_from_type(function: Any, _type: Any, args: tuple[Any, ...], _state: Any) -> Any:
    if not isinstance(function, _Function):
        raise ValueError("a tensor subclass with a rebuilder of its own")
    return function(*args)
