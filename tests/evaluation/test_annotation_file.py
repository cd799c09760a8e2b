"""Image files of an annotation file: below the folder of images, unless told otherwise."""

import pytest
from protocol_data import box, categories, entry, write

from groundingdino.evaluation.coco import CocoDetection


@pytest.mark.parametrize("name", ["../secret.jpg", "a/../../secret.jpg", "/secret.jpg", "", None])
def test_an_image_that_is_not_below_the_folder_is_refused_by_name(name, tmp_path):
    path = tmp_path / "train.json"
    write(path, {"images": [entry(7, name)], "annotations": [box(1, 7)], "categories": categories("cat")})
    with pytest.raises(ValueError, match=r"train\.json: image 7: file name .* is not below the image folder"):
        CocoDetection.load(path, tmp_path / "images").questions()


def test_files_outside_of_the_folder_are_evaluated_where_that_is_allowed(tmp_path):
    path = tmp_path / "train.json"
    write(path, {"images": [entry(7, "../a.jpg")], "annotations": [box(1, 7)], "categories": categories("cat")})
    (question,) = CocoDetection.load(path, tmp_path / "images", allow_outside=True).questions()
    assert question.image.path == tmp_path / "images" / "../a.jpg"
