"""Reading annotation files that may be anything: whole, of bounded size, in UTF-8; JSON and XML without surprises."""

import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar
from xml.etree import ElementTree

import msgspec
from PIL import Image

from groundingdino.inputs.images import SUFFIXES
from groundingdino.runtime.files import open_file

DEEPEST_YAML = 50  # collections within each other
T = TypeVar("T")
GZIP_MAGIC = b"\x1f\x8b"
MOST_EXPANSION = 200  # times; annotations shrink to a twentieth or so
ALWAYS_ALLOWED = 64 << 20  # bytes that any file may unpack to
HEAD = 1 << 16  # bytes that a format is recognised by
EXIF_ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)  # orientations that swap width and height
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_bytes(path: Path) -> bytes:
    """The content of a regular file, unpacked if it is gzip, as UTF-8 without a byte order mark.

    Raises:
        ValueError: naming the file, if it is missing, no regular file, or unpacks to far more than its size.
    """
    try:
        with open_file(path) as file:
            content = file.read()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if content.startswith(GZIP_MAGIC):
        content = _unpack(path, content)
    return _as_utf8(path, content)


def _unpack(path: Path, content: bytes) -> bytes:
    limit = max(ALWAYS_ALLOWED, MOST_EXPANSION * len(content))
    try:
        with gzip.open(io.BytesIO(content)) as file:
            unpacked = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from error
    if len(unpacked) > limit:
        raise ValueError(f"{path}: unpacks to over {limit >> 20} MiB; unpack it yourself if that is meant")
    return unpacked


def is_file(path: Path) -> bool:
    """Whether there is a regular file of this name; False of what cannot be a name."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def is_plain_utf8(head: bytes) -> bool:
    """Whether a file that begins so can be read as it lies: not packed, no byte order mark, not UTF-16."""
    return not head.startswith((GZIP_MAGIC, b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")) and b"\0" not in head[:2]


def _as_utf8(path: Path, content: bytes) -> bytes:
    encoding = None
    if content.startswith(b"\xef\xbb\xbf"):
        return content[3:]
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif content[1:2] == b"\0":
        encoding = "utf-16-le"
    elif content[:1] == b"\0":
        encoding = "utf-16-be"
    if encoding is None:
        return content
    try:
        return content.decode(encoding).encode()
    except UnicodeError as error:
        raise ValueError(f"{path}: not {encoding} text ({error})") from error


def read_text(path: Path) -> str:
    """The file's text. ValueError, naming the file, if it is missing or not UTF-8 (or UTF-16 with its mark)."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error


def read_yaml(path: Path) -> Any:
    """What a YAML document says, as plain data. ValueError, naming the file, if it is missing or not YAML."""
    import yaml

    text, depth = read_text(path), 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):  # its time grows with the square of the depth
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST_YAML:
                raise ValueError(f"{path}: nested over {DEEPEST_YAML} deep")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())[:200]})") from error


def dump_yaml(document: object) -> str:
    """Plain data as the text of a YAML document, in its own order."""
    import yaml

    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)  # type: ignore[no-any-return]


@cache
def _decoder(form: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(form, strict=False)  # "640" is a number, too: converters write such


def decode(raw: bytes | msgspec.Raw, form: type[T]) -> T:
    """JSON of a declared form. ValueError, one line that says which field is what instead."""
    try:
        return _decoder(form).decode(raw)  # type: ignore[arg-type, no-any-return]
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON ({_reason(bytes(raw), error)})") from error


def _reason(raw: bytes, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    if _LONE_SURROGATE.search(raw):
        return "half of a surrogate pair, such as half an emoji"
    if re.search(rb"\b(NaN|Infinity)\b", raw):
        return "NaN and Infinity are no numbers of JSON"
    return str(error).removeprefix("JSON is malformed: ")


def read_json(path: Path, form: type[T]) -> T:
    """A JSON file of a declared form. ValueError, naming the file, otherwise."""
    content = read_bytes(path)
    try:
        if not content.isascii():
            content.decode()  # also what is not asked for here is text then
        return decode(content, form)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file. ValueError, naming the file, if it is none or declares entities (they may explode)."""
    text = read_text(path)
    if "<!ENTITY" in text:
        raise ValueError(f"{path}: declares XML entities, which annotations do not need; remove them")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path}: not XML ({error})") from error


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each row of a CSV file with commas, semicolons or tabs. Empty rows are left out."""
    text = read_text(path)
    first = text[: text.find("\n")] if "\n" in text else text
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            if any(field.strip() for field in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: not CSV ({error})") from error


def parse_number(text: str) -> tuple[float, bool]:
    """A number, and whether it was written with a decimal comma. ValueError if it is none."""
    try:
        return float(text), False
    except ValueError:
        if text.count(",") == 1 and "." not in text:
            return float(text.replace(",", ".")), True
        raise ValueError(f"{text[:40]!r} is not a number") from None


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels of an image file, upright by its EXIF tag, from its header alone.

    Raises:
        ValueError: naming the file, if it is missing or no image.
    """
    try:
        if not is_file(path):
            raise ValueError(f"{path}: no such image file")
        with Image.open(path) as image:
            width, height = image.size
            return (height, width) if image.getexif().get(EXIF_ORIENTATION) in TURNED else (width, height)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error


def size_or_zero(path: Path | None) -> tuple[int, int]:
    """`upright_size`, or (0, 0) of an image that is missing or broken."""
    try:
        return (0, 0) if path is None else upright_size(path)
    except ValueError:
        return 0, 0


class ImageFolder:
    """Finds image files by the names that annotations give them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, name: str) -> Path | None:
        """The file below the folder: by its whole name, else by its stem where annotations name no suffix."""
        direct = self.root / name
        if direct.suffix.lower() in SUFFIXES and is_file(direct):
            return direct
        return self._by_stem.get(name) or self._by_stem.get(os.path.splitext(name)[0])

    @cached_property
    def _by_stem(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for file in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            if file.suffix.lower() in SUFFIXES:
                found.setdefault(file.stem, file)
        return found


def guess_images(annotations: Path, name: str) -> Path:
    """The folder near the annotations in which an image of this name lies; the annotations' own folder if none does."""
    own = annotations if annotations.is_dir() else annotations.parent
    near = [own, own / "images", own / "JPEGImages", own.parent, own.parent / "images", own.parent / "JPEGImages"]
    for folder in (own, own.parent):
        if folder.is_dir():
            near += sorted(child for child in folder.iterdir() if child.is_dir())
    return next((folder for folder in near if name and is_file(folder / name)), own)


class _Parts(msgspec.Struct):
    images: list[msgspec.Raw] | None = None
    categories: list[msgspec.Raw] | None = None
    shapes: msgspec.Raw = msgspec.Raw()


class Sample:
    """What a format is recognised by: the file's beginning and, of a JSON document, its first parts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_folder = path.is_dir()
        if not self.is_folder and not path.is_file():
            raise ValueError(f"{path}: not a file" if path.exists() else f"{path}: no such file or folder")

    @cached_property
    def content(self) -> bytes:
        """The whole file in UTF-8; empty for a folder."""
        return b"" if self.is_folder else read_bytes(self.path)

    @cached_property
    def _lies_plain(self) -> bool:
        """Whether the file can be read as it lies, without holding all of it."""
        with open_file(self.path) as file:
            return is_plain_utf8(file.read(4))

    @cached_property
    def head(self) -> bytes:
        """The file's first bytes, in UTF-8; empty for a folder."""
        if self.is_folder:
            return b""
        with self._open() as file:
            return file.read(HEAD)

    def _open(self) -> io.BufferedIOBase:
        return open_file(self.path) if self._lies_plain else io.BytesIO(self.content)

    @cached_property
    def first_line_keys(self) -> set[str]:
        """The fields of the object on the first line that is not blank; empty if there is none."""
        if not self.head.lstrip().startswith(b"{"):
            return set()
        with self._open() as file:
            first = next(line for line in file if not line.isspace())
        try:
            return set(decode(first, dict[str, msgspec.Raw]))
        except ValueError:  # half an object: the document goes on in the next line. Or a damaged line.
            return {"filename"} if b'"filename"' in first else set()

    @property
    def is_document(self) -> bool:
        """Whether the file is one JSON object of COCO's kind rather than lines of them."""
        return self.document is not None and self.document.images is not None

    @cached_property
    def document(self) -> _Parts | None:
        """The parts of a JSON object that tell formats apart; None if the file is none."""
        if not self.head.lstrip().startswith(b"{"):
            return None
        try:
            return msgspec.json.decode(self.content, type=_Parts)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None

    def parse(self) -> None:
        """ValueError, saying what is wrong, if a JSON document cannot be read."""
        decode(self.content, _Parts)

    @cached_property
    def first_image_keys(self) -> set[str]:
        """The fields of the first `images` entry of a JSON document."""
        return _first_keys(self.document.images if self.document else None)

    @cached_property
    def first_category_keys(self) -> set[str]:
        """The fields of the first `categories` entry of a JSON document."""
        return _first_keys(self.document.categories if self.document else None)


def _first_keys(items: list[msgspec.Raw] | None) -> set[str]:
    try:
        return set(decode(items[0], dict[str, msgspec.Raw])) if items else set()
    except ValueError:
        return set()
