"""Detections as plain data."""

import json

import pytest
import torch

from groundingdino.inference.results import to_coco, to_json
from groundingdino.structures import Detections

FOUND = Detections(
    boxes=torch.tensor([[1.0, 2.0, 11.0, 22.0], [0.5, 0.25, 4.126, 8.0]]),
    scores=torch.tensor([0.75, 0.5]),
    labels=torch.tensor([1, 0]),
    names=("dog", "cat"),
    spans=(((5, 8),), ((0, 1), (2, 3))),
)
NOTHING = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), ())


def test_json_is_plain_data_with_every_field():
    rows = json.loads(json.dumps(to_json(FOUND)))
    assert rows[0] == {"box": [1.0, 2.0, 11.0, 22.0], "score": 0.75, "label": 1, "name": "dog", "spans": [[5, 8]]}
    assert rows[1]["box"] == [0.5, 0.25, 4.13, 8.0] and rows[1]["spans"] == [[0, 1], [2, 3]]
    assert to_json(NOTHING) == []


def test_coco_results_load_in_pycocotools_with_the_files_category_ids():
    from pycocotools.coco import COCO

    data = COCO()
    data.dataset = {
        "info": {}, "images": [{"id": 7, "width": 40, "height": 40}], "annotations": [],
        "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
    }  # fmt: skip
    data.createIndex()
    results = to_coco(FOUND, image_id=7, category_ids=[17, 18])
    loaded = data.loadRes(results)
    assert [a["category_id"] for a in loaded.loadAnns(loaded.getAnnIds())] == [18, 17]
    assert results[0]["bbox"] == [1.0, 2.0, 10.0, 20.0]
    assert [entry["category_id"] for entry in to_coco(FOUND, 7)] == [1, 0]
    with pytest.raises(ValueError, match="label 1 has no category id"):
        to_coco(FOUND, 7, [17])
