"""Pascal VOC: one xml file per image. Corners are taken as they stand (labelling tools count pixels from 0)."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from groundingdino.data.formats import files
from groundingdino.data.formats.record import (
    CROWD,
    DIFFICULT,
    OCCLUDED,
    TRUNCATED,
    AnnotatedImage,
    AnnotatedObject,
    Kind,
    Problem,
    Reading,
    ReadOptions,
    checked,
    first_file_name,
    unusable,
)

CORNERS = ("xmin", "ymin", "xmax", "ymax")
FLAGS = (DIFFICULT, TRUNCATED, OCCLUDED)  # elements of an object, 0 or 1


def read(path: Path, options: ReadOptions) -> Reading:
    """A folder of xml files (VOC's own layout with Annotations, or any), or one xml file.

    Raises:
        ValueError: naming the folder or split, if there is none in it.
    """
    annotations = _annotation_folder(path)
    found = [path] if path.is_file() else sorted(annotations.glob("*.xml"))
    if options.split is not None:
        listed = _split_file(path, options.split)
        stems = [line.split()[0] for line in files.read_text(listed).splitlines() if line.strip()]
        found = [annotations / f"{stem}.xml" for stem in stems]
    if not found:
        raise ValueError(f"{path}: no xml file in this folder")
    first = first_file_name(_entries(found[:5], None, True))
    folder = files.ImageFolder(options.images or files.guess_images(annotations, first))

    def entries() -> Iterator[AnnotatedImage]:
        return _entries(found, folder, options.allow_outside)

    return Reading(path, "voc", entries, folder.root)


def _annotation_folder(path: Path) -> Path:
    return path / "Annotations" if (path / "Annotations").is_dir() else path


def _split_file(path: Path, split: str) -> Path:
    return path / "ImageSets" / "Main" / f"{split}.txt"


def splits(path: Path) -> list[str]:
    """The splits that ImageSets/Main lists, of the usual names."""
    return [name for name in ("train", "val", "test") if _split_file(path, name).is_file()]


def _entries(found: Iterable[Path], folder: files.ImageFolder | None, allow_outside: bool) -> Iterator[AnnotatedImage]:
    for number, file in enumerate(found, start=1):
        try:
            root = files.read_xml(file)
            if root.tag != "annotation":
                raise ValueError(f"{file}: expected <annotation>, found <{root.tag[:40]}>")
        except ValueError as error:
            yield unusable(str(file), str(error).removeprefix(f"{file}: "), number=number)
            continue
        yield checked(_convert(file, root, number, folder), allow_outside)


def _convert(file: Path, root: Element, number: int, folder: files.ImageFolder | None) -> AnnotatedImage:
    where, problems, objects = str(file), [], []
    name = (root.findtext("filename") or "").strip() or file.stem
    image = folder.find(name) or folder.find(file.stem) if folder else None
    if image is not None and folder is not None:
        name = str(image.relative_to(folder.root))
    try:
        width, height = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except (ValueError, OverflowError):
        width = height = 0
    if not (width > 0 and height > 0):
        text = f"size is {width}x{height}"
        width, height = files.size_or_zero(image)
        problems.append(Problem(Kind.IMAGE_SIZE, where, f"{text}; the image is {width}x{height}" if width else text))
    for place, element in enumerate(root.iter("object"), start=1):
        category = (element.findtext("name") or "").strip()
        texts = [element.findtext(f"bndbox/{corner}") for corner in CORNERS]
        try:
            x1, y1, x2, y2 = (float(text or "") for text in texts)
        except ValueError:
            shown = ", ".join(f"{c} {t!r:.40}" for c, t in zip(CORNERS, texts, strict=True))
            problems.append(Problem(Kind.MALFORMED, where, f"object {place}: bndbox is not four numbers ({shown})"))
            continue
        if not category:
            problems.append(Problem(Kind.UNKNOWN_CATEGORY, where, f"object {place}: it has no name"))
            continue
        flags = frozenset(flag for flag in FLAGS if (element.findtext(flag) or "0").strip() not in ("0", "false", ""))
        extra = {
            child.tag: child.text or ""
            for child in element
            if not len(child) and child.tag not in ("name", "bndbox", *FLAGS)
        }
        objects.append(AnnotatedObject((x1, y1, x2, y2), -1, category, place, flags, extra))
    return AnnotatedImage(where, name, width, height, tuple(objects), problems=tuple(problems), number=number)


def sniff(sample: files.Sample) -> bool:
    """Whether a file is a VOC xml, or a folder holds some, directly or in Annotations."""
    if sample.is_folder:
        return _is_voc(next(iter(sorted(_annotation_folder(sample.path).glob("*.xml"))), None))
    return b"<annotation>" in sample.head or b"<annotation " in sample.head


def _is_voc(file: Path | None) -> bool:
    return file is not None and b"<annotation" in files.Sample(file).head.replace(b"<annotations", b"")


def encode(entry: AnnotatedImage) -> bytes:
    """An entry as the text of its xml file."""
    root = Element("annotation")
    _add(root, "filename", entry.file_name)
    size = _add(root, "size", "")
    for side, pixels in (("width", entry.width), ("height", entry.height), ("depth", 3)):
        _add(size, side, str(pixels))
    for thing in entry.objects:
        element = _add(root, "object", "")
        _add(element, "name", thing.name)
        for flag in FLAGS:
            # VOC has no crowds; both kinds are not counted in evaluation.
            on = flag in thing.flags or (flag == DIFFICULT and CROWD in thing.flags)
            if flag != OCCLUDED or on:
                _add(element, flag, str(int(on)))
        for tag, text in (thing.extra if isinstance(thing.extra, dict) else {}).items():
            _add(element, tag, text)
        box = _add(element, "bndbox", "")
        for corner, position in zip(CORNERS, thing.box, strict=True):
            _add(box, corner, f"{position:.12g}")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8") + b"\n"


def _add(parent: Element, tag: str, text: str) -> Element:
    child = ElementTree.SubElement(parent, tag)
    child.text = text or None
    return child
