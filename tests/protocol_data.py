"""Made-up images and annotations in each protocol's real file layout."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 64, 48
IMAGES = 3


def photograph(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def entry(image_id: int, file_name: str, **more: Any) -> dict[str, Any]:
    return {"id": image_id, "file_name": file_name, "width": WIDTH, "height": HEIGHT, **more}


def box(number: int, image_id: int, category_id: int = 1, **more: Any) -> dict[str, Any]:
    bbox = [4 + 3 * number % 20, 5, 20 + number % 7, 18]
    area = bbox[2] * bbox[3]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": bbox,
        "area": area,
        "iscrowd": 0,
        **more,
    }


def categories(*names: str, first: int = 1, **more: Any) -> list[dict[str, Any]]:
    return [{"id": first + 2 * n, "name": name, **more} for n, name in enumerate(names)]


def coco(root: Path) -> None:
    for n in range(IMAGES):
        photograph(root / "val2017" / f"{n:012d}.jpg", n)
    images = [entry(n, f"{n:012d}.jpg") for n in range(IMAGES)]
    boxes = [box(n + 1, n % IMAGES, 1 + 2 * (n % 2)) for n in range(4)]
    document = {"images": images, "annotations": boxes, "categories": categories("cat", "traffic light", "dog")}
    write(root / "annotations" / "instances_val2017.json", document)


def lvis(root: Path) -> None:
    images = []
    for n, folder in enumerate(("val2017", "train2017", "val2017")):
        photograph(root / folder / f"{n:012d}.jpg", n)
        url = f"http://images.cocodataset.org/{folder}/{n:012d}.jpg"
        lists = {"neg_category_ids": [5], "not_exhaustive_category_ids": [3]}
        images.append({**entry(n, ""), "coco_url": url, **lists})
    names = categories("bow_(weapon)", "aerosol_can", "cup", "dog")
    for category, frequency in zip(names, "rcff", strict=True):
        category["frequency"] = frequency
    document = {"images": images, "annotations": [box(n + 1, n, 1 + 2 * n) for n in range(3)], "categories": names}
    write(root / "annotations" / "lvis_v1_minival_inserted_image_name.json", document)


def grefcoco(root: Path) -> None:
    images, boxes = [], []
    for n in range(IMAGES):
        photograph(root / "train2014" / f"COCO_train2014_{n}.jpg", n)
    for n, caption in enumerate(("two cups", "the cup on the left", "no dog", "a chair", "all men")):
        images.append(entry(n, f"COCO_train2014_{n % IMAGES}.jpg", caption=caption, dataset_name="grefcoco"))
        boxes += [box(10 * n, n, -1)] if n == 2 else [box(10 * n + i, n) for i in range(2 - n % 2)]
    write(root / "mdetr_annotations" / "finetune_grefcoco_val.json", {"images": images, "annotations": boxes})


def flickr30k(root: Path) -> None:
    images, boxes = [], []
    for n, caption in enumerate(("a man and a red ball", "two dogs play", "a red ball by a man")):
        photograph(root / "flickr30k_images" / f"{n // 2}.jpg", n)
        marked = {0: [[[0, 5]], [[10, 20]]], 1: [[[0, 8]]], 2: [[[0, 10]], [[14, 19]]]}[n]
        images.append(entry(n, f"{n // 2}.jpg", caption=caption, tokens_positive_eval=marked, original_img_id=n // 2))
        boxes += [box(10 * n + i, n, phrase_ids=i) for i in range(len(marked))] + [box(10 * n + 9, n, phrase_ids=0)]
    write(root / "mdetr_annotations" / "final_flickr_separateGT_val.json", {"images": images, "annotations": boxes})


def odinw(root: Path) -> None:
    for folder, names in (("pothole/valid", ["pothole"]), ("thermalDogsAndPeople/valid", ["dog", "person"])):
        photograph(root / folder / "1.jpg", 1)
        document = {
            "images": [entry(0, "1.jpg")],
            "annotations": [box(1, 0, 1)],
            "categories": [{"id": 0, "name": "things"}, *categories(*names)],
        }
        write(root / folder / "annotations_without_background.json", document)


def dod(root: Path) -> None:
    sentences = {1: "dog on a leash", 2: "dog without a leash", 3: "a person who holds a very large red umbrella up"}
    images, groups = {}, {0: {"id": 0, "inner_sent_id": [2, 1]}, 1: {"id": 1, "inner_sent_id": [3]}}
    for n in range(IMAGES):
        photograph(root / "d3_images" / f"group{n // 2}" / f"{n}.jpg", n)
        images[n] = {**entry(n, f"group{n // 2}/{n}.jpg"), "group_id": n // 2}
    tables = {
        "images": images,
        "groups": groups,
        "sentences": {n: {"id": n, "raw_sent": s} for n, s in sentences.items()},
    }
    for name, table in tables.items():
        path = root / "d3_pkl" / f"{name}.pkl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(table))
    for name, wanted in (("full", (1, 2, 3)), ("pres", (1, 3)), ("abs", (2,))):
        boxes = [box(n, place, n) for n, place in ((1, 0), (2, 1), (3, 2)) if n in wanted]
        document = {
            "images": [entry(n, images[n]["file_name"]) for n in range(IMAGES)],
            "annotations": boxes,
            "categories": [{"id": n, "name": sentences[n]} for n in wanted],
        }
        write(root / "d3_json" / f"d3_{name}_annotations.json", document)


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "coco": coco,
    "lvis": lvis,
    "grefcoco": grefcoco,
    "flickr30k": flickr30k,
    "odinw": odinw,
    "dod": dod,
}
