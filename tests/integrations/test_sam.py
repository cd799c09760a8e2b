"""Boxes and masks through transformers' own SAM classes, on random weights."""

import numpy as np
import pytest
import torch
from detections import FOUND, NOTHING, SIZE
from PIL import Image
from pycocotools import mask as coco_mask
from tiny_sam import write_sam

from groundingdino import masks, to_sam_boxes

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny SAM as transformers saves it."""
    return write_sam(tmp_path_factory.mktemp("sam"))


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8))


def test_boxes_go_into_a_sam_processor_as_they_are(folder, image):
    processor = transformers.AutoProcessor.from_pretrained(folder)
    boxes = processor(image, input_boxes=to_sam_boxes(FOUND), return_tensors="pt")["input_boxes"]
    scale = 64 / max(SIZE)
    torch.testing.assert_close(boxes[0].float(), FOUND.boxes * scale, atol=0.3, rtol=0)  # it rounds the image's size


def test_a_mask_is_what_sams_own_classes_give_for_that_box(folder, image):
    codes = masks(image, FOUND, folder)
    assert [code["size"] for code in codes] == [[SIZE[1], SIZE[0]]] * 2
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.SamModel.from_pretrained(folder).eval()
    for index, code in enumerate(codes):
        inputs = processor(image, input_boxes=[[FOUND.boxes[index].tolist()]], return_tensors="pt")
        with torch.no_grad():
            logits = model(inputs["pixel_values"], input_boxes=inputs["input_boxes"], multimask_output=False).pred_masks
        wanted = processor.image_processor.post_process_masks(
            logits, inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )[0][0, 0]
        np.testing.assert_array_equal(coco_mask.decode(code).astype(bool), wanted.numpy())
    assert 0 < sum(coco_mask.area(codes)) < 2 * SIZE[0] * SIZE[1]


@pytest.mark.parametrize("family", ["Sam2", "SamHQ"])
def test_other_sams_of_transformers_take_the_same_call(family, image, tmp_path):
    if not hasattr(transformers, f"{family}Model"):
        pytest.skip(f"this transformers has no {family}")
    folder = write_sam(tmp_path, family)
    codes = masks(image, FOUND, folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = getattr(transformers, f"{family}Model").from_pretrained(folder).eval()
    for box, code in zip(FOUND.boxes.tolist(), codes, strict=True):
        inputs = processor(image, input_boxes=[[box]], return_tensors="pt")
        sizes = {key: inputs.pop(key) for key in ("original_sizes", "reshaped_input_sizes") if key in inputs}
        with torch.no_grad():
            logits = model(**inputs, multimask_output=False).pred_masks
        (wanted,) = processor.image_processor.post_process_masks(logits, **sizes)
        np.testing.assert_array_equal(coco_mask.decode(code).astype(bool), wanted[0, 0].numpy())
    assert 0 < sum(coco_mask.area(codes)) < 2 * SIZE[0] * SIZE[1]


def test_no_detection_has_no_mask_and_a_folder_that_is_no_sam_is_one_line(folder, image, tmp_path):
    assert masks(image, NOTHING, folder) == []
    with pytest.raises(ValueError, match="is no SAM model that transformers can load") as caught:
        masks(image, FOUND, tmp_path)
    assert "\n" not in str(caught.value)
