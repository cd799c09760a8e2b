"""Label files as X-AnyLabeling 4.2 reads them (its reader needs a window; its fields are checked here)."""

import json

from detections import FOUND, NOTHING, SIZE

from groundingdino.integrations.x_anylabeling import to_x_anylabeling


def test_a_label_file_has_every_field_that_its_reader_takes():
    file = json.loads(json.dumps(to_x_anylabeling(FOUND, "photo.jpg", SIZE)))
    assert (file["imagePath"], file["imageData"], file["imageHeight"], file["imageWidth"]) == (
        "photo.jpg",
        None,
        50,
        40,
    )
    dog = file["shapes"][0]
    assert (dog["label"], dog["score"], dog["shape_type"]) == ("dog", 0.75, "rectangle")
    assert dog["points"] == [[1.0, 2.0], [11.0, 2.0], [11.0, 22.0], [1.0, 22.0]]
    assert dog["kie_linking"] == [] and dog["flags"] == {} and dog["attributes"] == {}
    assert to_x_anylabeling(NOTHING, "photo.jpg", SIZE)["shapes"] == []


def test_our_own_reader_of_such_files_reads_it(tmp_path):
    from PIL import Image

    from groundingdino.data.formats.registry import read

    Image.new("RGB", SIZE).save(tmp_path / "photo.png")
    (tmp_path / "photo.json").write_text(json.dumps(to_x_anylabeling(FOUND, "photo.png", SIZE)))
    (entry,) = read(tmp_path).entries()
    assert [o.name for o in entry.objects] == ["dog", "cat"]
    assert list(entry.objects[0].box) == [1.0, 2.0, 11.0, 22.0]
