"""Images from folders, lists, tar shards, annotation files, videos and object stores as one stream of references.

A reference says in a few words where an image is: it is written to a list, sent to other processes, and opened there.
"""

import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image

from groundingdino.data.formats import registry
from groundingdino.inference.remote import files_below, is_uri, open_remote, path_of, read_remote
from groundingdino.inputs.images import SUFFIXES, decode_image, open_image

VIDEOS = frozenset({".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v"})
LISTS = frozenset({".txt", ".lst"})


class ImageRef(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Where one image is."""

    name: str  # below the root of the run, with "/"; of a tar shard or a video, "shard.tar/name.jpg", "film.mp4/000125"
    file: str  # absolute path, or URI, of the image, the tar shard or the video
    offset: int = -1  # of a tar shard: the image's first byte
    size: int = 0  # of a tar shard: its bytes
    frame: int = -1  # of a video: its number from 0
    image_id: int | str | None = None  # in the annotation file that names it


def list_images(sources: Sequence[str | Path], every: int = 1) -> Iterator[ImageRef]:
    """The images of all sources, in an order that does not depend on the file system.

    Args:
        sources: images; folders, with those below them; lists of paths (.txt), relative to the list; tar shards;
            annotation files of any known format; videos. Images, folders and tar shards may be URIs, such as
            s3://bucket/photos, and so may the lines of a list.
        every: of a video, take each `every`th frame from the first.
    Raises:
        ValueError: naming a source that is missing or of no such kind.
    """
    root = root_of(sources)
    for source in sources:
        yield from _remote_refs(str(source), root) if is_uri(source) else _refs(Path(source).absolute(), root, every)


def root_of(sources: Sequence[str | Path]) -> Path:
    """The folder that names are below; of URIs `path_of` it."""
    places = {os.path.realpath(place) for source in sources for place in _places(source)}
    return Path(os.path.commonpath(places))


def open_ref(ref: ImageRef) -> Image.Image:
    """The upright RGB image. ValueError, naming it, if it cannot be read to its end."""
    if ref.frame >= 0:
        return _video(ref.file).frame(ref.frame)
    if is_uri(ref.file):
        content = read_remote(ref.file, max(ref.offset, 0), ref.size if ref.offset >= 0 else None)
        return decode_image(content, ref.name)
    if ref.offset < 0:
        return open_image(ref.file)
    try:
        with open(ref.file, "rb") as file:
            file.seek(ref.offset)
            return decode_image(file.read(ref.size), ref.name)
    except OSError as error:
        raise ValueError(f"{ref.file}: cannot be read ({error.strerror})") from error


def is_annotations(source: Path) -> bool:
    """Whether it is an annotation file, whose images are wanted."""
    return source.suffix.lower() in (".json", ".jsonl")


def _places(given: str | Path) -> Iterable[Path]:
    """The folders that the names of a source must be below."""
    if is_uri(given):
        folder = path_of(str(given))
        return (folder.parent if _is_one(folder) else folder,)
    source = Path(given).absolute()
    if source.is_dir():
        return (source,)
    if not source.is_file():
        raise ValueError(f"{source}: no such file or folder")
    if is_annotations(source):
        return (registry.read(source).images,)
    if source.suffix.lower() in LISTS:
        common: str | None = None
        for path in _listed(source):
            own = os.path.realpath((path_of(path) if is_uri(path) else Path(path)).parent)
            common = own if common is None else os.path.commonpath((common, own))
        if common is None:
            raise ValueError(f"{source}: lists no image")
        return (Path(common),)
    return (source.parent,)


def _refs(source: Path, root: Path, every: int) -> Iterator[ImageRef]:
    suffix = source.suffix.lower()
    if source.is_dir():
        yield from (_file(path, root) for path in _below(source))
    elif is_annotations(source):
        reading = registry.read(source)
        seen: set[str] = set()  # an image may have several captions
        for entry in reading:
            if entry.usable and entry.file_name not in seen:
                seen.add(entry.file_name)
                ref = _file(reading.images.absolute() / entry.file_name, root)
                image_id = entry.image_id if reading.format in ("coco", "lvis") else None
                yield msgspec.structs.replace(ref, image_id=image_id)
    elif suffix in LISTS:
        for place in _listed(source):
            yield _remote_file(place, root) if is_uri(place) else _file(Path(place), root)
    elif suffix == ".tar":
        with open(source, "rb") as shard:
            yield from _members(shard, str(source), _name(source, root))
    elif suffix in VIDEOS:
        name = _name(source, root)
        for frame in range(0, count_frames(source), every):
            yield ImageRef(f"{name}/{frame:06d}", str(source), frame=frame)
    elif suffix in SUFFIXES:
        yield _file(source, root)
    else:
        known = ", ".join(sorted({*SUFFIXES, *LISTS, *VIDEOS, ".tar", ".json"}))
        raise ValueError(f"{source}: neither a folder nor of a kind that is known ({known})")


def _is_one(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES or path.suffix.lower() == ".tar"


def _remote_refs(uri: str, root: Path) -> Iterator[ImageRef]:
    """The images of a URI: of a folder with those below it, of a tar shard, or itself."""
    path = path_of(uri)
    suffix = path.suffix.lower()
    if suffix == ".tar":
        with closing(open_remote(uri)) as shard:
            yield from _members(shard, uri, _name(path, root))
    elif suffix in SUFFIXES:
        yield _remote_file(uri, root)
    elif suffix in LISTS | VIDEOS or is_annotations(path):
        raise ValueError(f"{uri}: lists, annotation files and videos must be local; a list may have URIs in it")
    else:
        for file in files_below(uri):
            if os.path.splitext(file)[1].lower() in SUFFIXES:
                yield _remote_file(file, root)


def _remote_file(uri: str, root: Path) -> ImageRef:
    return ImageRef(_name(path_of(uri), root), uri)


def _file(path: Path, root: Path) -> ImageRef:
    return ImageRef(_name(path, root), str(path))


def _name(path: Path, root: Path) -> str:
    """Below the root, by the real folder but the file's own name, which may be a link."""
    return Path(os.path.relpath(os.path.join(os.path.realpath(path.parent), path.name), root)).as_posix()


def _below(folder: Path) -> Iterator[Path]:
    """Image files of a folder and its subfolders, by name; hidden ones and links to folders aside."""
    with os.scandir(folder) as entries:
        inside = sorted((one.name, one.is_dir(follow_symlinks=False)) for one in entries if one.name[0] != ".")
    for name, is_folder in inside:
        if is_folder:
            yield from _below(folder / name)
        elif os.path.splitext(name)[1].lower() in SUFFIXES:
            yield folder / name


def _listed(source: Path) -> Iterator[str]:
    """The paths and URIs of a list."""
    with open(source, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if place := line.strip():
                yield place if is_uri(place) else str(source.parent / place)


def _members(file: Any, source: str, name: str) -> Iterator[ImageRef]:
    """Images of an uncompressed tar file in webdataset's layout; what else belongs to a sample is left alone."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as shard:
            for member in shard:
                shard.members = []  # type: ignore[attr-defined]  # else it remembers each
                if member.isreg() and os.path.splitext(member.name)[1].lower() in SUFFIXES:
                    yield ImageRef(f"{name}/{member.name}", source, member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{source}: not an uncompressed tar file ({error})") from error


class _Video:
    """Frames of a video by rising numbers; a lower one starts it again."""

    def __init__(self, path: str) -> None:
        self._path, self._next = path, 0
        self._frames = self._decode()

    def frame(self, number: int) -> Image.Image:
        if number < self._next:
            self._next, self._frames = 0, self._decode()
        for frame in self._frames:
            self._next += 1
            if self._next == number + 1:
                return frame.to_image()  # type: ignore[no-any-return]
        raise ValueError(f"{self._path}: frame {number} cannot be decoded")

    def _decode(self) -> Iterator[Any]:
        av = _pyav()
        try:
            with av.open(self._path) as container:
                yield from container.decode(video=0)
        except (av.FFmpegError, IndexError) as error:
            raise ValueError(f"{self._path}: not a readable video ({_reason(error)})") from error


@lru_cache(maxsize=1)
def _video(path: str) -> _Video:
    return _Video(path)


def count_frames(source: Path) -> int:
    """Of a video, from its packets, without decoding. ValueError for what is none, or without PyAV."""
    av = _pyav()
    try:
        with av.open(str(source)) as container:
            return sum(packet.size > 0 for packet in container.demux(video=0))
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{source}: not a readable video ({_reason(error)})") from error


def _pyav() -> Any:
    """PyAV; FFmpeg's own lines on stderr are switched off, as errors say the same. ValueError where it is missing."""
    try:
        import av
    except ImportError as error:
        raise ValueError('videos need PyAV: pip install "groundingdino[video]"') from error
    av.logging.set_level(None)
    return av


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or "it has no video stream"
