"""Rendered scenes as files: a data set in RefCOCO's layout, as MDETR annotates it."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from groundingdino.data.synthetic import (
    FORMS,
    SPLITS,
    Expression,
    Scene,
    SyntheticConfig,
    matches,
    render,
    scenes_of_split,
)
from groundingdino.runtime.files import write_text

SUMMARY_FILE = "synthetic.json"


def write_dataset(root: Path, config: SyntheticConfig | None = None) -> dict[str, dict[str, float]]:
    """Render a data set in RefCOCO's layout: `root/train2014` and `root/mdetr_annotations/finetune_refcoco_*.json`.

    A finished data set of the same config is left as it is. Returns what `root/synthetic.json` records for each split:
    `scenes`, `captions`, `expressions`, the number of expressions of each form, and the Precision@1 to expect of
    guessing: `chance` picks any object of the scene, `noun_chance` any with the shape that the sentence names,
    `description_chance` any with the shape, color and size that it names (so it ignores places, relations, ordinals).
    """
    config = config or SyntheticConfig()
    summary_path = root / SUMMARY_FILE
    if summary_path.is_file():
        found = json.loads(summary_path.read_text())
        if found["config"] == json.loads(json.dumps(asdict(config))):
            return found["splits"]
        summary_path.unlink()  # from here on the folder is unfinished
    (root / "train2014").mkdir(parents=True, exist_ok=True)
    (root / "mdetr_annotations").mkdir(exist_ok=True)
    splits, first_id = {}, 1
    for split in SPLITS:
        splits[split] = _write_split(root, config, split, first_id)
        first_id += int(splits[split]["scenes"])
    write_text(summary_path, json.dumps({"config": asdict(config), "splits": splits}, indent=1))
    return splits


def _write_split(root: Path, config: SyntheticConfig, split: str, first_id: int) -> dict[str, float]:
    images: list[dict] = []
    annotations: list[dict] = []
    forms: Counter[str] = Counter()
    hits = dict.fromkeys(("chance", "noun_chance", "description_chance"), 0.0)  # expected, of each way of guessing
    scenes = 0
    for scene, expressions in scenes_of_split(config, split):
        original_id = first_id + scenes
        scenes += 1
        file_name = f"COCO_train2014_{original_id:012d}.jpg"
        render(scene).save(root / "train2014" / file_name, quality=92)
        # Training asks all at once, which teaches several times as much per picture; the sentences cannot see each
        # other (`text.sub_sentences`). Evaluation asks one at a time.
        captions = [expressions] if split == "train" else [[expression] for expression in expressions]
        for caption in filter(None, captions):
            text, spans = _joined(caption)
            images.append({
                "id": len(images),
                "file_name": file_name,
                "height": scene.size,
                "width": scene.size,
                "original_id": original_id,
                "caption": text,
                "dataset_name": "refcoco",
                "tokens_negative": [[0, len(text)]],
            })  # fmt: skip
            annotations += _annotations(scene, spans, image_id=images[-1]["id"], first_id=len(annotations))
        for expression in expressions:
            forms[expression.form] += 1
            hits["chance"] += 1 / len(scene.objects)
            hits["noun_chance"] += 1 / len(matches((None, None, scene.objects[expression.target].shape), scene))
            hits["description_chance"] += 1 / expression.candidates
    document = {
        "info": {},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }
    write_text(root / "mdetr_annotations" / f"finetune_refcoco_{split}.json", json.dumps(document))
    means = {name: round(value / max(forms.total(), 1), 4) for name, value in hits.items()}
    counts = {form: forms[form] for form in FORMS}
    return {"scenes": scenes, "captions": len(images), "expressions": forms.total(), **means, **counts}


def _joined(expressions: Sequence[Expression]) -> tuple[str, dict[int, list[list[int]]]]:
    """One caption that holds all expressions, and the spans [start, end) that name each target."""
    caption, spans = "", defaultdict(list)
    for expression in expressions:
        caption += ". " if caption else ""
        spans[expression.target].append([len(caption), len(caption) + len(expression.caption)])
        caption += expression.caption
    return caption, spans


def _annotations(scene: Scene, spans: dict[int, list[list[int]]], image_id: int, first_id: int) -> list[dict]:
    """MDETR's annotation of each object that a caption names."""
    annotations: list[dict] = []
    for target, positive in spans.items():
        left, top, right, bottom = (round(value, 2) for value in scene.objects[target].box)
        width, height = round(right - left, 2), round(bottom - top, 2)
        annotation = {
            "id": first_id + len(annotations),
            "image_id": image_id,
            "bbox": [left, top, width, height],
            "area": round(width * height, 2),
            "iscrowd": 0,
            "category_id": 1,
            "original_id": first_id + len(annotations),
            "tokens_positive": positive,
        }
        annotations.append(annotation)
    return annotations
