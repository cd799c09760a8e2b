"""Images from every kind of source: found, named below one root, and opened again from their reference."""

import io
import json
import tarfile

import numpy as np
import pytest
from label_runs import write_film
from PIL import Image

from groundingdino.inference.image_source import list_images, open_ref, root_of


def picture(value: int, size=(12, 8)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for value, name in enumerate(("b.png", "a/z.png", "a/y/x.PNG", "a.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(root / name)
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_bytes(b"")
    return root


def test_a_folder_gives_the_images_below_it_by_name(folder):
    refs = list(list_images([folder]))
    assert [ref.name for ref in refs] == ["a/y/x.PNG", "a/z.png", "a.png", "b.png"]
    assert [open_ref(ref).getpixel((0, 0))[0] for ref in refs] == [2, 1, 3, 0]
    assert root_of([folder]) == folder


def test_a_list_and_single_images_are_named_below_what_they_have_in_common(folder, tmp_path):
    (tmp_path / "list.txt").write_text("photos/a/z.png\n\nphotos/a/y/x.PNG\n")
    assert [ref.name for ref in list_images([tmp_path / "list.txt"])] == ["z.png", "y/x.PNG"]
    names = [ref.name for ref in list_images([tmp_path / "list.txt", folder / "b.png"])]
    assert names == ["a/z.png", "a/y/x.PNG", "b.png"]


def test_a_tar_shard_is_read_by_place_without_unpacking(tmp_path):
    with tarfile.open(tmp_path / "shard-0.tar", "w") as shard:
        for number in range(3):
            file = io.BytesIO()
            picture(number).save(file, "png")
            for name, content in ((f"{number:04d}.png", file.getvalue()), (f"{number:04d}.json", b"{}")):
                member = tarfile.TarInfo(f"set/{name}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    refs = list(list_images([tmp_path / "shard-0.tar"]))
    assert [ref.name for ref in refs] == [f"shard-0.tar/set/{number:04d}.png" for number in range(3)]
    assert [open_ref(ref).getpixel((0, 0))[0] for ref in reversed(refs)] == [2, 1, 0]
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match="broken.tar: not an uncompressed tar file"):
        list(list_images([tmp_path / "broken.tar"]))


def test_a_coco_file_gives_its_images_and_their_ids(folder):
    images = [{"id": 7, "file_name": "b.png", "width": 12, "height": 8}]
    document = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (folder / "coco.json").write_text(json.dumps(document))
    (ref,) = list_images([folder / "coco.json"])
    assert (ref.name, ref.image_id) == ("b.png", 7)


def test_a_video_gives_every_nth_frame_in_any_order(tmp_path):
    film = write_film(tmp_path / "film.mp4", 12)
    refs = list(list_images([film], every=5))
    assert [(ref.name, ref.frame) for ref in refs] == [(f"film.mp4/{n:06d}", n) for n in (0, 5, 10)]
    shown = [float(np.asarray(open_ref(refs[place])).mean()) for place in (0, 2, 1, 1)]
    assert shown == pytest.approx([0, 212, 106, 106], abs=6)
    with pytest.raises(ValueError, match="frame 99 cannot be decoded"):
        open_ref(type(refs[0])("film.mp4/99", str(film), frame=99))


def test_what_is_no_source_is_named(tmp_path, folder):
    with pytest.raises(ValueError, match="none: no such file or folder"):
        list(list_images([tmp_path / "none"]))
    (tmp_path / "a.docx").touch()
    with pytest.raises(ValueError, match="a.docx: neither a folder nor of a kind"):
        list(list_images([tmp_path / "a.docx"]))
    (tmp_path / "film.mp4").write_bytes(b"no film")
    with pytest.raises(ValueError, match="not a readable video|videos need PyAV: pip install"):
        list(list_images([tmp_path / "film.mp4"]))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="lists no image"):
        list(list_images([tmp_path / "empty.txt"]))
    damaged = next(list_images([folder]))
    (folder / "a/y/x.PNG").write_bytes(b"no image")
    with pytest.raises(ValueError, match="x.PNG: not a readable image"):
        open_ref(damaged)


@pytest.fixture
def store(folder):
    """A store in memory with the folder's files and a tar shard of them."""
    import fsspec

    system = fsspec.filesystem("memory")
    system.put(str(folder), "/bucket/photos", recursive=True)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as shard:
        shard.add(folder / "b.png", "b.png")
        shard.add(folder / "a.png", "a.png")
    system.pipe("/bucket/shard.tar", file.getvalue())
    yield system
    system.rm("/bucket", recursive=True)


def test_uris_of_folders_images_and_shards_are_read_as_local_ones_are(folder, store, tmp_path):
    local, remote = list(list_images([folder])), list(list_images(["memory://bucket/photos"]))
    shown = [{ref.name: open_ref(ref).getpixel((0, 0)) for ref in refs} for refs in (local, remote)]
    assert shown[0] == shown[1] and len(remote) == 4
    refs = list(list_images(["memory://bucket/shard.tar", "memory://bucket/photos/a.png"]))
    assert [ref.name for ref in refs] == ["shard.tar/b.png", "shard.tar/a.png", "photos/a.png"]
    assert [open_ref(ref).getpixel((0, 0))[0] for ref in refs] == [0, 3, 3]
    (tmp_path / "list.txt").write_text("memory://bucket/photos/a/z.png\nmemory://bucket/photos/b.png\n")
    assert [ref.name for ref in list_images([tmp_path / "list.txt"])] == ["a/z.png", "b.png"]


def test_what_a_store_does_not_have_is_named_and_one_that_does_not_answer_is_no_broken_image(store, monkeypatch):
    for uri, message in (
        ("memory://bucket/none/", "none/: no such file or folder, or an empty one"),
        ("memory://bucket/names.json", "must be local"),
        ("nowhere://bucket", "nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            list(list_images([uri]))
    first = next(list_images(["memory://bucket/photos"]))
    store.rm(first.file)
    with pytest.raises(ValueError, match="png: FileNotFoundError"):
        open_ref(first)
    monkeypatch.setattr(type(store), "cat_file", lambda *_, **__: (_ for _ in ()).throw(TimeoutError("no answer")))
    with pytest.raises(OSError, match="png: TimeoutError: no answer"):
        open_ref(first)
