"""Every image of a data set opened, in parallel: what its annotations should have said."""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import msgspec
from PIL import Image

from groundingdino.data.formats.files import EXIF_ORIENTATION, TURNED, is_file
from groundingdino.data.formats.record import Box
from groundingdino.inputs.images import readable_formats

MOST_THREADS = 16  # decoding frees the interpreter; more only wait for the disk
AHEAD = 64  # images read before the first of them is asked for


class ImageFacts(msgspec.Struct, frozen=True):
    """What an image file holds."""

    size: tuple[int, int] = (0, 0)  # (width, height) in pixels, upright
    stored: tuple[int, int] = (0, 0)  # before the EXIF rotation
    orientation: int = 1
    digest: bytes = b""  # of the file's bytes
    missing: bool = False
    error: str = ""  # why it cannot be decoded to the end


def examine(path: Path) -> ImageFacts:
    """Decode one image file to its end."""
    if not is_file(path):
        return ImageFacts(missing=True)
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=readable_formats()) as image:
            image.load()
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
            stored = image.size
    except MemoryError:
        return ImageFacts(error="needs more memory than there is")
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them
        return ImageFacts(error=" ".join(str(error).split())[:200] or type(error).__name__)
    orientation = orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
    size = (stored[1], stored[0]) if orientation in TURNED else stored
    return ImageFacts(size, stored, orientation, hashlib.blake2b(content, digest_size=16).digest())


def examine_all(paths: Iterable[Path], done: Callable[[], object] = lambda: None) -> Iterator[tuple[Path, ImageFacts]]:
    """`examine` of every path, in order; `done` is called after each."""
    remaining = iter(paths)
    with warnings.catch_warnings(), ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")  # what Pillow warns of is reported, or harmless
        while group := list(islice(remaining, AHEAD)):
            for path, facts in zip(group, pool.map(examine, group), strict=True):
                done()
                yield path, facts


def turn_box(box: Box, stored: tuple[int, int], orientation: int) -> Box:
    """A box drawn on the image as stored -> the same on the upright image.

    Args:
        box: pixels of the stored image.
        stored: its (width, height).
        orientation: the EXIF tag, 1 to 8.
    """
    (x1, y1, x2, y2), (w, h) = box, stored
    if orientation in (2, 3, 7, 8):  # mirrored or turned so that columns count backwards
        x1, x2 = w - x2, w - x1
    if orientation in (3, 4, 6, 7):
        y1, y2 = h - y2, h - y1
    return (y1, x1, y2, x2) if orientation in TURNED else (x1, y1, x2, y2)
