"""The rendered scenes: what an independent reader of each sentence finds, and the files as RefCOCO readers see them."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from groundingdino.data.convert import convert_file
from groundingdino.data.synthetic import (
    COLORS,
    FORMS,
    Scene,
    SceneObject,
    SyntheticConfig,
    make_scene,
    render,
    scenes_of_split,
)
from groundingdino.data.synthetic_refcoco import write_dataset

SMALL = SyntheticConfig(train_scenes=12, heldout_scenes=5)

# ------------------------------------------------------------ a reader of sentences that shares no code with the writer

NOUN = r"(?:(?P<{0}size>small|large) )?(?:(?P<{0}color>red|green|blue|yellow) )?(?P<{0}shape>\w+)"
SENTENCE = re.compile(
    r"the (?:(?P<rank>leftmost|rightmost|topmost|lowest|second|third) )?"
    + NOUN.format("")
    + r"(?: from the (?P<side>left|right|top|bottom)"
    + r"| (?P<relation>left of|right of|above|below) the "
    + NOUN.format("other_")
    + ")?$"
)


def described(scene: Scene, words: dict[str, str | None], prefix: str = "") -> list[SceneObject]:
    wanted = {key: words[prefix + key] for key in ("size", "color", "shape") if words[prefix + key]}
    return [item for item in scene.objects if all(getattr(item, key) == value for key, value in wanted.items())]


def middle(item: SceneObject) -> tuple[float, float]:
    left, top, right, bottom = item.box
    return (left + right) / 2, (top + bottom) / 2


def answers(sentence: str, scene: Scene, margin: float, quadrant: bool) -> list[SceneObject]:
    """Objects that the sentence may mean; ranks closer than `margin` pixels count as ties."""
    match = SENTENCE.match(sentence)
    assert match, f"not a sentence of the grammar: {sentence}"
    words = match.groupdict()
    members = described(scene, words)
    if words["relation"]:
        (anchor,) = described(scene, words, "other_")
        return [item for item in members if item is not anchor and beyond(words["relation"], item, anchor, quadrant)]
    if not words["rank"]:
        return members
    side = (
        words["side"] or {"leftmost": "left", "rightmost": "right", "topmost": "top", "lowest": "bottom"}[words["rank"]]
    )
    axis = 0 if side in ("left", "right") else 1
    row = sorted(members, key=lambda item: middle(item)[axis], reverse=side in ("right", "bottom"))
    picked = row[{"second": 1, "third": 2}.get(words["rank"], 0)]
    return [item for item in row if abs(middle(item)[axis] - middle(picked)[axis]) < margin]


def beyond(relation: str, item: SceneObject, anchor: SceneObject, quadrant: bool) -> bool:
    dx, dy = (a - b for a, b in zip(middle(item), middle(anchor), strict=True))
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > 0 and (not quadrant or abs(across) <= along)


@pytest.fixture(scope="module")
def pairs() -> list:
    return list(scenes_of_split(SyntheticConfig(train_scenes=300), "train"))


@pytest.mark.parametrize("quadrant", [False, True], ids=["half plane", "quadrant"])
def test_an_independent_reader_finds_exactly_the_target(pairs: list, quadrant: bool) -> None:
    for scene, expressions in pairs:
        for expression in expressions:
            assert answers(expression.caption, scene, 5.9, quadrant) == [scene.objects[expression.target]], expression


def test_the_noun_alone_never_answers_and_every_form_occurs(pairs: list) -> None:
    forms = Counter()
    for scene, expressions in pairs:
        for expression in expressions:
            forms[expression.form] += 1
            noun = scene.objects[expression.target].shape
            assert sum(item.shape == noun for item in scene.objects) >= 2
    assert min(forms[form] for form in FORMS) > 0.1 * forms.total(), forms


def test_relations_places_and_ordinals_are_needed(pairs: list) -> None:
    for scene, expressions in pairs:
        for expression in expressions:
            words = SENTENCE.match(expression.caption).groupdict()
            left_over = len(described(scene, words))
            assert left_over == expression.candidates
            minimum = {"attribute": 1, "place": 2, "relation": 2, "ordinal": 3}[expression.form]
            assert left_over == 1 if minimum == 1 else left_over >= minimum


def test_objects_lie_inside_the_picture_apart_and_differ_visibly_in_size(pairs: list) -> None:
    for scene, _ in pairs:
        assert 4 <= len(scene.objects) <= 5
        boxes = [item.box for item in scene.objects]
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert left >= 0 and top >= 0 and right <= scene.size and bottom <= scene.size
            for a, b, c, d in boxes[:i]:
                assert right < a or c < left or bottom < b or d < top
        extent = {"small": [], "large": []}
        for item, (left, top, right, bottom) in zip(scene.objects, boxes, strict=True):
            extent[item.size].append(max(right - left, bottom - top))
        assert max(extent["small"], default=0) < min(extent["large"], default=scene.size)


def test_a_box_encloses_what_was_drawn_to_a_pixel() -> None:
    for seed in range(20):
        scene = make_scene(Random(seed))
        for item in scene.objects:
            alone = render(Scene(scene.size, (0, 0, 0), (item,)))
            drawn = alone.convert("L").point(lambda value: 255 if value > 20 else 0).getbbox()
            assert drawn == pytest.approx(item.box, abs=1.5), item


def test_the_drawn_color_is_the_named_one() -> None:
    for seed in range(20):
        scene = make_scene(Random(seed))
        for item in scene.objects:
            pixel = render(Scene(scene.size, (255, 255, 255), (item,))).getpixel(tuple(int(c) for c in item.center))
            nearest = min(COLORS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLORS[name], pixel, strict=True)))
            assert nearest == item.color


# ------------------------------------------------------------------------------------------------------------- files


def documents(root: Path) -> dict[str, dict]:
    folder = root / "mdetr_annotations"
    return {p.stem.removeprefix("finetune_refcoco_"): json.loads(p.read_text()) for p in sorted(folder.iterdir())}


def test_the_annotations_have_the_fields_of_the_real_ones(golden: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path, SMALL)
    real = json.loads((golden / "data/mdetr_annotations/finetune_refcoco_train.json").read_text())
    ours = documents(tmp_path)
    assert sorted(ours) == ["testA", "testB", "train", "val"]
    for document in ours.values():
        assert list(document) == list(real)
        assert document["categories"] == real["categories"]
        for kind in ("images", "annotations"):
            assert all(list(entry) == list(real[kind][0]) for entry in document[kind])
        for image in document["images"]:
            with Image.open(tmp_path / "train2014" / image["file_name"]) as picture:
                assert picture.format == "JPEG" and picture.size == (image["width"], image["height"])


def test_held_out_captions_are_one_sentence_with_one_box(tmp_path: Path) -> None:
    write_dataset(tmp_path, SMALL)
    for split in ("val", "testA", "testB"):
        document = documents(tmp_path)[split]
        for image, annotation in zip(document["images"], document["annotations"], strict=True):
            assert image["id"] == annotation["image_id"] and SENTENCE.match(image["caption"])
            assert annotation["tokens_positive"] == [[0, len(image["caption"])]]


def test_the_sentences_of_a_training_caption_name_their_boxes(tmp_path: Path) -> None:
    write_dataset(tmp_path, SMALL)
    document = documents(tmp_path)["train"]
    of_image = {image["id"]: [] for image in document["images"]}
    for annotation in document["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    scenes = [scene for scene, expressions in scenes_of_split(SMALL, "train") if expressions]
    assert max(image["caption"].count(". ") for image in document["images"]) == 5
    for scene, image in zip(scenes, document["images"], strict=True):
        asked = []
        for annotation in of_image[image["id"]]:
            left, top, width, height = annotation["bbox"]
            for start, end in annotation["tokens_positive"]:
                (answer,) = answers(image["caption"][start:end], scene, 5.9, quadrant=False)
                assert answer.box == pytest.approx((left, top, left + width, top + height), abs=0.02)
                asked.append(image["caption"][start:end])
        assert sorted(asked) == sorted(image["caption"].split(". "))


def test_the_sentences_of_a_training_caption_become_regions(tmp_path: Path) -> None:
    write_dataset(tmp_path, SMALL)
    annotations = tmp_path / "mdetr_annotations/finetune_refcoco_train.json"
    written, notes = convert_file(annotations, tmp_path / "train_vg.json")
    document = json.loads(annotations.read_text())
    assert written == len(document["images"]) and not notes
    lines = [json.loads(line) for line in (tmp_path / "train_vg.json").read_text().splitlines()]
    assert sum(len(line["grounding"]["regions"]) for line in lines) == len(document["annotations"])


def test_no_scene_is_in_two_splits(tmp_path: Path) -> None:
    write_dataset(tmp_path, SMALL)
    home: dict[str, str] = {}
    for split, document in documents(tmp_path).items():
        for name in {image["file_name"] for image in document["images"]}:
            digest = hashlib.sha256((tmp_path / "train2014" / name).read_bytes()).hexdigest()
            assert home.setdefault(digest, split) == split
    assert len(home) == 12 + 3 * 5


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    def digest(folder: str, seed: int) -> str:
        write_dataset(tmp_path / folder, SyntheticConfig(train_scenes=4, heldout_scenes=2, seed=seed))
        files = sorted(p for p in (tmp_path / folder).rglob("*") if p.is_file())
        return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()

    assert digest("a", 1) == digest("b", 1) != digest("c", 2)


def test_an_unfinished_data_set_is_written_anew_and_a_finished_one_is_kept(tmp_path: Path) -> None:
    first = write_dataset(tmp_path, SMALL)
    picture = tmp_path / "train2014" / "COCO_train2014_000000000001.jpg"
    picture.write_bytes(b"touched")
    assert write_dataset(tmp_path, SMALL) == first
    assert picture.read_bytes() == b"touched"
    (tmp_path / "synthetic.json").unlink()
    assert write_dataset(tmp_path, SMALL) == first
    assert picture.read_bytes() != b"touched"


def test_the_recorded_chance_is_what_guessing_scores(tmp_path: Path) -> None:
    config = SyntheticConfig(train_scenes=1, heldout_scenes=100)
    summary = write_dataset(tmp_path, config)["val"]
    rng, hits, noun_hits, total = Random(0), 0, 0, 0
    for scene, expressions in scenes_of_split(config, "val"):
        for expression in expressions:
            same_noun = [i for i, o in enumerate(scene.objects) if o.shape == scene.objects[expression.target].shape]
            for _ in range(50):
                hits += rng.randrange(len(scene.objects)) == expression.target
                noun_hits += rng.choice(same_noun) == expression.target
                total += 1
    assert summary["chance"] == pytest.approx(hits / total, abs=0.01)
    assert summary["noun_chance"] == pytest.approx(noun_hits / total, abs=0.01)
    assert summary["chance"] <= 0.25
    assert summary["noun_chance"] < summary["description_chance"] < 0.7


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="unknown split 'testC'"):
        next(scenes_of_split(SMALL, "testC"))
