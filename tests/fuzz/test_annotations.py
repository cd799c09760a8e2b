"""Whatever stands in annotation files of any format, the outcome is entries or one line that names file and place."""

import json
import re
import shutil
from pathlib import Path

import pytest
from fuzz.fuzzing import ODD_VALUES, damaged, damaged_bytes, outcome, run_cases
from hypothesis import strategies as st
from PIL import Image

from groundingdino.data import load_expressions, load_training
from groundingdino.data.convert import convert
from groundingdino.data.formats.odvg import load_label_map
from groundingdino.data.formats.record import ReadOptions
from groundingdino.data.formats.registry import read_splits
from groundingdino.data.validate import CheckOptions, check

CASES = 100
GOLDEN = Path(__file__).parent.parent / "golden"
DOCUMENTS = {
    "coco": json.loads((GOLDEN / "formats" / "coco_v1.json").read_text()),
    "lvis": json.loads((GOLDEN / "converters" / "lvis_v1.json").read_text()),
    "mdetr": json.loads((GOLDEN / "converters" / "final_mixed_train.json").read_text()),
    "grounding": json.loads((GOLDEN / "converters" / "final_mixed_train_vg.json").read_text().splitlines()[0]),
    "detection": json.loads((GOLDEN / "converters" / "lvis_v1_od.json").read_text().splitlines()[0]),
    "labelme": json.loads((GOLDEN / "formats" / "labelme" / "2007_000032.json").read_text()),
}
TEXT_FILES = {  # of formats that are no JSON: (folder or file to read, the file in it that is damaged)
    "voc": ("voc", "voc/2007_000032.xml"),
    "imagenet": ("imagenet", "imagenet/Annotations/2007_000032.xml"),
    "cvat": ("cvat.xml", "cvat.xml"),
    "table": ("openimages.csv", "openimages.csv"),
    "yolo": ("yolo", "yolo/obj_train_data/2007_000032.txt"),
    "yolo names": ("yolo", "yolo/obj.names"),
    "yolo data": ("yolo", "yolo/obj.data"),
    "yolo list": ("yolo", "yolo/train.txt"),
    "yaml": ("yolov5", "yolov5/data.yaml"),
}
LABEL_MAP = {"0": "cat", "1": "dog"}
WORD = re.compile(rb"[^<>\s,:=\"]+")
ODD_WORDS = [
    b"",
    b"-1",
    b"1e999",
    b"nan",
    b"9" * 400,
    b"\xff\xfe",
    b"\0",
    b"x" * 70_000,
    b"../a.jpg",
    b"/etc/passwd",
    b"&b;",
]
ODD_WORDS += [
    b"[" * 2000,
    b"*a",
    b"&a [*a]",
    b"!!python/name:os.system",
    b"<a>",
    b"]]>",
    b"\x1b[2J",
    b",,,,",
    b"\r",
    b"{}",
]


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """A JSON document with an odd value in one place, without a field, or with bytes changed or cut."""
    document = draw(st.sampled_from(list(DOCUMENTS.values())))
    content = json.dumps(draw(damaged(document))).encode()
    return draw(damaged_bytes(content)) if draw(st.integers(0, 9)) == 0 else content


@st.composite
def texts(draw: st.DrawFn, content: bytes) -> bytes:
    """The file with an odd word in the place of one, or with bytes changed or cut."""
    if draw(st.booleans()):
        return draw(damaged_bytes(content))
    word = draw(st.sampled_from(list(WORD.finditer(content))))
    return content[: word.start()] + draw(st.sampled_from(ODD_WORDS)) + content[word.end() :]


def use(path: Path, options: ReadOptions, folder: Path) -> None:
    """Everything that is done with annotations; only a ValueError in one line may end it."""
    uses = (
        lambda: list(check(path, options, CheckOptions(open_images=False)).lines()),
        lambda: load_training(path, None, "skip", options=options).entry(0),
        lambda: load_training(path, None, "stop", options=options).entry(0),
        lambda: [list(reading) for reading in read_splits(path, options).values()],
        lambda: convert(path, folder / "coco", "coco", options),
        lambda: convert(path, folder / "odvg", "odvg", options),
        lambda: load_expressions(path),
    )
    elsewhere = path.name == "yolo" and b"/etc/passwd" in (path / "train.txt").read_bytes()
    for attempt in uses:  # Darknet's lists may name images anywhere: the message is about a file beside that image
        outcome(attempt, *([] if elsewhere else [str(path.parent)]))


def test_any_json_is_entries_or_one_line(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.json"
    path.parent.mkdir()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        use(path, ReadOptions(images=tmp_path), tmp_path)

    run_cases(request, documents(), check, CASES)


def test_any_label_map_is_one_or_one_line(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = tmp_path / "a.json"

    def check(case: object) -> None:
        path.write_text(json.dumps(case))
        outcome(lambda: load_label_map(path), str(path))

    run_cases(request, st.one_of(damaged(LABEL_MAP), st.sampled_from(ODD_VALUES)), check, CASES)


def yolov5(folder: Path) -> None:
    """The other layout of YOLO."""
    for name in ("images/train", "labels/train"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (50, 40)).save(folder / "images/train/a.jpg")
    (folder / "labels/train/a.txt").write_text("0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2 0.3 0.3\n")
    (folder / "data.yaml").write_text("path: .\ntrain: images/train\nnc: 2\nnames:\n  0: cat\n  1: dog\n")


def test_any_text_is_entries_or_one_line(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    root = tmp_path / "formats"
    shutil.copytree(GOLDEN / "formats", root)
    yolov5(root / "yolov5")
    for name, size in {"2007_000027": (486, 500), "2007_000032": (500, 281), "2007_000129": (334, 500)}.items():
        Image.new("RGB", size).save(root / f"{name}.jpg")
        Image.new("RGB", size).save(root / "yolo" / "obj_train_data" / f"{name}.jpg")

    def check(case: tuple[str, bytes]) -> None:
        place, file = TEXT_FILES[case[0]]
        whole = (root / file).read_bytes()
        (root / file).write_bytes(case[1])
        try:
            use(root / place, ReadOptions(images=root), tmp_path)
        finally:
            (root / file).write_bytes(whole)

    kinds = st.sampled_from(sorted(TEXT_FILES))
    cases = kinds.flatmap(lambda kind: st.tuples(st.just(kind), texts((root / TEXT_FILES[kind][1]).read_bytes())))
    run_cases(request, cases, check, CASES)
