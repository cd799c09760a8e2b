"""From a name or a path to a checkpoint on the disk: the one door by which weights come in.

What `resolve` takes: a checkpoint of ours; any other file or folder that `convert` reads; the name of a release (see
`zoo`), or `owner/name`, a repository of the Hugging Face hub. Only names of the last two kinds use the network, and not
with GROUNDINGDINO_OFFLINE=1 or HF_HUB_OFFLINE=1. Converted files are kept in the cache, under the hash of their source.
"""

import contextlib
import hashlib
import json
import logging
import time
from pathlib import Path

from groundingdino.checkpoints import zoo
from groundingdino.checkpoints.adapter import ADAPTER_KEY
from groundingdino.checkpoints.download import DownloadError, download
from groundingdino.checkpoints.formats.foreign_weights import (
    NATIVE_CONFIG,
    SHARDS,
    WHOLE,
    is_safetensors,
    weight_files,
)
from groundingdino.checkpoints.run_state import STATE_KEY
from groundingdino.checkpoints.safetensors_file import TensorFile
from groundingdino.runtime.cache import cache_folder, is_offline, locked
from groundingdino.runtime.files import write_text
from groundingdino.runtime.messages import printable

CONVERSION = "v2"  # of this converter; others keep their files in a folder of their own
SETTLED = 2.0  # seconds after which a file's time of change tells it from a later one of the same size
HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "pytorch_model.bin", "*.pth")

logger = logging.getLogger(__name__)


def resolve(name_or_path: str | Path) -> Path:
    """The checkpoint of ours that a name or path means, converted and downloaded as needed, each once.

    Raises:
        ValueError: one line that says what was looked for and what can be done: no such file or release, weights of
            another model, no network.
        OSError: the cache cannot be written.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if path.exists():
        return _native(path)
    if name in zoo.BY_NAME:
        release = zoo.BY_NAME[name]
        if _is_from_hub(release):
            return _native(_from_hub(release.hub[0]), release.hub[0])
        return _native(_fetch(release))
    if zoo.is_repository(path):
        return _native(_from_hub(name), name)
    beside = path.with_suffix(".safetensors")
    if path.suffix in zoo.FILE_SUFFIXES and beside.exists():
        raise ValueError(f"{printable(name)}: no such file; name {beside} if that is what you mean")
    known = next((release for release in zoo.RELEASES if release.file and release.file == path.name), None)
    if known is not None:
        raise ValueError(
            f"{printable(name)}: no such file; fetch it from {known.url}, or name the release: {known.name}"
        )
    releases = ", ".join(release.name for release in zoo.RELEASES if release.url)
    raise ValueError(f"{printable(name)}: no such file; releases that can be named: {releases}")


def is_cached(release: zoo.Release) -> bool:
    """Whether the file or repository that a release's name stands for is in its cache, ours or huggingface_hub's."""
    if not _is_from_hub(release):
        return bool(release.file) and _place(release).exists()
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return False
    return any(isinstance(try_to_load_from_cache(release.hub[0], name), str) for name in (WHOLE, SHARDS))


def _is_from_hub(release: zoo.Release) -> bool:
    """Whether its name means its repository: the hub checks what it sends, a URL without a known hash does not."""
    return bool(release.hub) and not release.sha256


def native_file(path: Path) -> Path | None:
    """The file of a path that is one of ours, so not to be converted; None for weights of other programs."""
    files = weight_files(path)
    if len(files) == 1 and is_safetensors(files[0]):
        with TensorFile(files[0]) as file:
            if file.metadata.keys() & {NATIVE_CONFIG, STATE_KEY, ADAPTER_KEY}:  # the last two: refused when loaded
                return files[0]
    return None


def _digest(files: tuple[Path, ...]) -> str:
    """SHA-256 of the files' bytes, which are read once: a note in the cache tells it of files that have not changed."""
    from groundingdino.checkpoints.convert import file_digest  # long, and rarely needed

    found = [(str(path.absolute()), stat.st_size, stat.st_mtime_ns) for path in files for stat in (path.stat(),)]
    note = cache_folder() / "digests" / hashlib.sha256(json.dumps(found).encode()).hexdigest()
    with contextlib.suppress(OSError):
        return note.read_text()
    digest = file_digest(files)
    if max(time_ns for *_, time_ns in found) < time.time_ns() - SETTLED * 1e9:
        with contextlib.suppress(OSError):  # a cache that cannot be written: the next load reads the bytes again
            note.parent.mkdir(parents=True, exist_ok=True)
            write_text(note, digest)
    return digest


def _native(path: Path, hub: str = "") -> Path:
    """The path itself if it is a checkpoint of ours, else the converted one in the cache."""
    own = native_file(path)
    if own is not None:
        return own
    from groundingdino.checkpoints.convert import convert_file

    target = cache_folder() / "converted" / CONVERSION / f"{_digest(weight_files(path))}.safetensors"
    if target.exists():
        return target
    try:
        with locked(target.with_suffix(".lock")):
            if not target.exists():  # another process may have been first
                for line in convert_file(path, target, hub=hub).lines():
                    logger.info(line)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} was to be converted into {target}, which cannot be written ({error.strerror}); name another "
            "folder with GROUNDINGDINO_CACHE, or convert it yourself with `groundingdino convert`",
        ) from error
    return target


def _place(release: zoo.Release) -> Path:
    return cache_folder() / "downloads" / release.file


def _fetch(release: zoo.Release) -> Path:
    """The released file, from the cache or its URL."""
    if not release.url:
        raise ValueError(f"{release.name}: only figures were published of {release.title}, no weights")
    target = _place(release)
    if target.exists():
        return target
    by_hand = f"fetch {release.url} and put it at {target}"
    if is_offline():
        raise ValueError(f"{release.name}: not in the cache, and the environment forbids the network; {by_hand}")
    try:
        with locked(target.with_suffix(".lock")):
            if not target.exists():
                logger.info("downloading %s (%s)", release.url, release.title)
                download(release.url, target, release.sha256)
    except DownloadError as error:
        raise ValueError(f"{release.name}: {error}; or {by_hand}") from error
    except OSError as error:
        raise OSError(
            error.errno,
            f"{release.name}: {target} cannot be written ({error.strerror}); name another folder with "
            "GROUNDINGDINO_CACHE",
        ) from error
    return target


def _from_hub(repository: str) -> Path:
    """A repository of the hub in huggingface_hub's cache. Its switches, endpoint and token are honoured."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise ValueError(
            f"{repository}: no such file; to load from the Hugging Face hub, pip install huggingface_hub"
        ) from None
    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(HUB_FILES), local_files_only=is_offline()))
    except LocalEntryNotFoundError:
        raise ValueError(
            f"{repository}: no such file, not in the cache of huggingface_hub, and the hub cannot be reached"
            + (" (the environment forbids the network)" if is_offline() else "")
            + f"; fetch https://huggingface.co/{repository} by hand and name its folder"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{repository}: no such file, and the hub does not give it ({reason})") from error
    return _weights_in(folder, repository)


def _weights_in(folder: Path, repository: str) -> Path:
    try:
        weight_files(folder)
        return folder
    except ValueError:
        found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".pth"))
        if len(found) == 1:
            return found[0]
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{repository}: which of its weights? ({names}); fetch one and name the file") from None
