"""Read what `torch.save` wrote, without torch.load and without ever running pickled code.

A pickle is a program: it names functions and calls them. Here the few names that rebuild tensors get our own
rebuilders; every other name (mmengine's HistoryBuffer, numpy scalars, `os.system`) becomes an inert class that swallows
what is done to it. So nothing is imported, nothing runs, and a checkpoint opens without the packages it was made with.
Tensors are views of the memory-mapped file: opening costs no memory, reading costs what is read.

Why not torch.load(weights_only=True, mmap=True) with inert stand-ins registered by safe_globals: it refuses a whole
file for one foreign subclass of list or dict, hashes any key (a tuple nested deeply enough crashes the interpreter or
never ends), registers the stand-ins for the whole process, and its errors recommend weights_only=False.
"""

import io
import math
import mmap
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from groundingdino.runtime.files import open_file
from groundingdino.runtime.messages import brief

PLAIN = (str, int, float, bool, bytes, type(None))
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
    with open_file(path) as file:
        start, size = file.read(512), os.fstat(file.fileno()).st_size
        if start[:2] != b"PK":
            raise ValueError(f"{path}: {describe_beginning(start, size)}")
        try:
            with zipfile.ZipFile(file) as archive:
                return _read_archive(path, file, archive)
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError, ValueError) as error:
            if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
                raise
            raise ValueError(
                f"{path}: truncated or damaged PyTorch file ({size} bytes, {brief(str(error))}); fetch it again"
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


def _read_archive(path: Path, file: BinaryIO, archive: zipfile.ZipFile) -> PytorchFile:
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        kind = (
            "a TorchScript archive" if any(n.endswith("/constants.pkl") for n in archive.namelist()) else "a zip file"
        )
        raise ValueError(f"{path}: {kind} without the one data.pkl of a PyTorch checkpoint")
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise ValueError(
            f"{path}: its parts are compressed, which torch.save never does; rewrite it once with "
            "torch.save(torch.load(path, weights_only=True), new_path)"
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError(f"{path}: saved on a big-endian machine, which is not supported")
    reader = _Reader(io.BytesIO(archive.read(pickles[0])), _Storages(file, archive, f"{root}data/"))
    try:
        content = reader.load()
    except zipfile.BadZipFile:
        raise
    except Exception as error:  # a damaged or hostile pickle can fail in any way; none of them is ours to debug
        reason = brief(str(error) or type(error).__name__)
        raise ValueError(f"{path}: damaged PyTorch file, its pickle cannot be read ({reason})") from error
    return PytorchFile(content, tuple(sorted(reader.inert)))


class _Storages:
    """Byte ranges of the archive as 1-D uint8 tensors. Nothing is read until a tensor is used."""

    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile, prefix: str) -> None:
        self._archive, self._prefix = archive, prefix
        # Private copy-on-write pages: torch wants writable memory, and nobody may change the user's file.
        self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def bytes_of(self, key: str) -> Tensor:
        try:
            entry = self._archive.getinfo(self._prefix + key)
        except KeyError:
            raise zipfile.BadZipFile(f"tensor data {key!r} is missing") from None
        if entry.file_size == 0:
            return torch.empty(0, dtype=torch.uint8)
        header = self._mapped[entry.header_offset : entry.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile(f"no file header at byte {entry.header_offset}")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start = entry.header_offset + 30 + name_length + extra_length
        if start + entry.file_size > len(self._mapped):
            raise zipfile.BadZipFile(f"tensor data {key!r} ends after the file")
        return torch.frombuffer(self._mapped, dtype=torch.uint8, count=entry.file_size, offset=start)


PythonUnpickler: Any = vars(pickle)["_Unpickler"]  # which the type stubs do not know


class _Reader(PythonUnpickler):
    """The standard library's unpickler in Python, with the two ways closed that lead out of plain data.

    `find_class` is the only way to code, and here it leads nowhere. Keys are the only objects whose size is not that of
    the bytes that describe them: the hash of a tuple of tuples of ... costs a stack frame a level, and time without end
    where each level holds the last one twice. (The unpickler in C allocates what sizes promise, and cannot be closed.)
    """

    dispatch = dict(PythonUnpickler.dispatch)

    def __init__(self, stream: BinaryIO, storages: _Storages) -> None:
        super().__init__(stream, encoding="latin1")
        self.inert: set[str] = set()
        self._storages = storages
        self._functions = {
            "torch._utils._rebuild_tensor_v2": _Function(_rebuild_tensor),
            "torch._utils._rebuild_tensor_v3": _Function(_rebuild_tensor_with_dtype),
            "torch._utils._rebuild_parameter": _Function(lambda tensor, *_: tensor),
            "torch._utils._rebuild_parameter_with_state": _Function(lambda tensor, *_: tensor),
            "torch._tensor._rebuild_from_type_v2": _Function(_rebuild_from_type),
            "collections.OrderedDict": _Function(_ordered_dict),
        }

    def find_class(self, module: str, name: str) -> Any:
        qualified = f"{module}.{name}"
        if qualified in self._functions:
            return self._functions[qualified]
        if module in ("torch", "torch.storage") and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        self.inert.add(qualified)
        return _inert_class(qualified)

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        _check_keys(self.stack[::2])
        super().load_dict()

    def load_additems(self) -> None:
        _check_keys(self.stack)
        super().load_additems()

    def load_frozenset(self) -> None:
        _check_keys(self.stack)
        super().load_frozenset()

    def load_bytearray8(self) -> None:
        raise ValueError("a bytearray, whose size may be anything")

    dispatch |= {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _device, _numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError("a reference to something that is not a tensor's storage")
        data = self._storages.bytes_of(key)
        return data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)


@lru_cache(maxsize=1024)
def _inert_class(qualified: str) -> type[Inert]:
    return type("Inert", (Inert,), {"name": qualified})


def _check_keys(keys: Iterable[Any]) -> None:
    """ValueError for a key whose hash may take long: neither a plain value, nor a flat tuple of some."""
    for key in keys:
        if not all(isinstance(item, (*PLAIN, Inert)) for item in (key if type(key) is tuple else (key,))):
            raise ValueError(f"a nested tuple or {type(key).__name__} as the key of a dict")


def _ordered_dict(pairs: Iterable[tuple[Any, Any]] = ()) -> OrderedDict[Any, Any]:
    pairs = list(pairs)
    _check_keys(key for key, _ in pairs)
    return OrderedDict(pairs)


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if not all(type(number) is int for number in (offset, *size, *stride)):  # a product with a tuple repeats it
        raise ValueError("a tensor whose shape is not made of numbers")
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
