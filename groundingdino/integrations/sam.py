"""Boxes as prompts for Segment Anything, and masks from transformers' SAM classes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundingdino.inputs.images import ImageLike, load_image
from groundingdino.structures import Detections

BOXES_PER_PASS = 64  # of the mask decoder
Segmenter = tuple[Any, Any]  # processor and model


def to_sam_boxes(found: Detections) -> list[list[list[float]]]:
    """The boxes of one image as a SAM processor's `input_boxes`: [[[x1, y1, x2, y2], ...]] in pixels.

    The predictors of `segment_anything` and `sam2` take `np.array(to_sam_boxes(found)[0])`.
    """
    return [found.boxes.tolist()]


def load_segmenter(path: str | Path, device: str | torch.device = "cpu") -> Segmenter:
    """Processor and model of a folder that transformers wrote, or of a name such as "facebook/sam-vit-base".

    ValueError in one line where there is no such model.
    """
    from transformers import AutoModelForMaskGeneration, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(str(path))
        return processor, AutoModelForMaskGeneration.from_pretrained(str(path)).eval().to(device)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no SAM model that transformers can load: {str(error).splitlines()[0]}") from error


@torch.no_grad()
def masks(image: ImageLike, found: Detections, model: str | Path | Segmenter) -> list[dict[str, Any]]:
    """COCO's run-length encoding {"size": [height, width], "counts": str}, one a detection, in order.

    Args:
        image: the one that the detections are of.
        model: as for `load_segmenter`, which is called each time, or what it returned.
    """
    from pycocotools import mask as coco_mask

    image = load_image(image)
    processor, segmenter = model if isinstance(model, tuple) else load_segmenter(model)
    found_masks: list[dict[str, Any]] = []
    for start in range(0, len(found.boxes), BOXES_PER_PASS):
        boxes = [found.boxes[start : start + BOXES_PER_PASS].tolist()]
        inputs = processor(image, input_boxes=boxes, return_tensors="pt").to(segmenter.device)
        sizes = {key: inputs.pop(key) for key in ("original_sizes", "reshaped_input_sizes") if key in inputs}
        logits = segmenter(**inputs, multimask_output=False).pred_masks.cpu()
        (pixels,) = processor.image_processor.post_process_masks(logits, **sizes)  # (K, 1, H, W) bool
        for mask in pixels[:, 0].numpy():
            code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            found_masks.append({"size": code["size"], "counts": code["counts"].decode()})
    return found_masks
