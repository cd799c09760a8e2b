"""Rendered shapes as a detection data set in Roboflow's layout of COCO's format: train, valid and test."""

import json
from pathlib import Path
from random import Random
from typing import Any

from groundingdino.data.synthetic import SHAPES, make_scene, render

SIZE = 64  # pixels


def write_shapes(root: Path, train: int = 8, others: int = 2) -> Path:
    """Images and `_annotations.coco.json` in root/train, root/valid and root/test."""
    rng = Random(0)
    for split, count in (("train", train), ("valid", others), ("test", others)):
        folder = root / split
        folder.mkdir(parents=True)
        images: list[dict[str, Any]] = []
        boxes: list[dict[str, Any]] = []
        for number in range(count):
            scene = make_scene(rng, SIZE)
            name = f"{split}_{number:03d}.png"
            render(scene).save(folder / name)
            images.append({"id": number, "file_name": name, "width": SIZE, "height": SIZE})
            for thing in scene.objects:
                x1, y1, x2, y2 = map(round, thing.box)
                place = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
                kind = {"image_id": number, "category_id": 1 + SHAPES.index(thing.shape)}
                boxes.append({"id": len(boxes), **kind, **place})
        names = [{"id": 1 + place, "name": shape} for place, shape in enumerate(SHAPES)]
        document = {"images": images, "annotations": boxes, "categories": names}
        (folder / "_annotations.coco.json").write_text(json.dumps(document))
    return root
