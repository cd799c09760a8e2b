"""Object Detection in the Wild: 13 or 35 small data sets, each scored as COCO, and their average.

Names, prompts and folders are those of mmdetection's `configs/mm_grounding_dino/odinw`: the 13 are prompted by the
plain names of their files; of the 35, three have words around their name, and some categories are renamed. The prompts
are the packaged vocabularies `odinw/NAME`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from groundingdino.evaluation import coco
from groundingdino.evaluation.annotation_file import image_file, read_document
from groundingdino.evaluation.answers import Floats, ImageAnswer, Integers
from groundingdino.evaluation.report import Figures
from groundingdino.evaluation.runner import Question
from groundingdino.inference.vocabulary import Vocabulary, plain_names, read_vocabulary

PLAIN = "annotations_without_background.json"


@dataclass(frozen=True)
class DataSet:
    """One data set of the suite: its validation split below the data root."""

    name: str
    folder: str  # of the images; `annotations` is in it
    annotations: str = PLAIN
    vocabulary: str = ""  # the packaged one; default is that of `name`
    plain: bool = False  # whether categories are prompted by their names, whatever the vocabulary says


THIRTY_FIVE = (
    DataSet("AerialMaritimeDrone_large", "AerialMaritimeDrone/large/valid"),
    DataSet("AerialMaritimeDrone_tiled", "AerialMaritimeDrone/tiled/valid"),
    DataSet(
        "AmericanSignLanguageLetters", "AmericanSignLanguageLetters/American Sign Language Letters.v1-v1.coco/valid"
    ),
    DataSet("Aquarium", "Aquarium/Aquarium Combined.v2-raw-1024.coco/valid"),
    DataSet("BCCD", "BCCD/BCCD.v3-raw.coco/valid"),
    DataSet("boggleBoards", "boggleBoards/416x416AutoOrient/export", f"val_{PLAIN}"),
    DataSet("brackishUnderwater", "brackishUnderwater/960x540/valid"),
    DataSet("ChessPieces", "ChessPieces/Chess Pieces.v23-raw.coco/valid", f"new_{PLAIN}"),
    DataSet("CottontailRabbits", "CottontailRabbits/valid"),
    DataSet("dice", "dice/mediumColor/export", f"val_{PLAIN}"),
    DataSet("DroneControl", "DroneControl/Drone Control.v3-raw.coco/valid"),
    DataSet("EgoHands_generic", "EgoHands/generic/valid"),
    DataSet("EgoHands_specific", "EgoHands/specific/valid"),
    DataSet("HardHatWorkers", "HardHatWorkers/raw/valid"),
    DataSet("MaskWearing", "MaskWearing/raw/valid"),
    DataSet("MountainDewCommercial", "MountainDewCommercial/valid"),
    DataSet("NorthAmericaMushrooms", "NorthAmericaMushrooms/North American Mushrooms.v1-416x416.coco/valid"),
    DataSet("openPoetryVision", "openPoetryVision/512x512/valid"),
    DataSet("OxfordPets_by_breed", "OxfordPets/by-breed/valid"),
    DataSet("OxfordPets_by_species", "OxfordPets/by-species/valid"),
    DataSet("PKLot", "PKLot/640/valid"),
    DataSet("Packages", "Packages/Raw/valid"),
    DataSet("PascalVOC", "PascalVOC/valid"),
    DataSet("pistols", "pistols/export", f"val_{PLAIN}"),
    DataSet("plantdoc", "plantdoc/416x416/valid"),
    DataSet("pothole", "pothole/valid"),
    DataSet("Raccoons", "Raccoon/Raccoon.v2-raw.coco/valid"),
    DataSet("selfdrivingCar", "selfdrivingCar/fixedLarge/export", f"val_{PLAIN}"),
    DataSet("ShellfishOpenImages", "ShellfishOpenImages/raw/valid"),
    DataSet("ThermalCheetah", "ThermalCheetah/valid"),
    DataSet("thermalDogsAndPeople", "thermalDogsAndPeople/valid"),
    DataSet("UnoCards", "UnoCards/raw/valid"),
    DataSet("VehiclesOpenImages", "VehiclesOpenImages/416x416/valid"),
    DataSet("WildfireSmoke", "WildfireSmoke/valid"),
    DataSet("websiteScreenshots", "websiteScreenshots/valid"),
)
# The 13: some have another name among the 35.
OLDER_NAMES = {
    "AerialMaritimeDrone_large": "AerialMaritimeDrone",
    "EgoHands_generic": "EgoHands",
    "Raccoons": "Raccoon",
}
THIRTEEN_OF_THEM = (
    "AerialMaritimeDrone_large Aquarium CottontailRabbits EgoHands_generic NorthAmericaMushrooms Packages PascalVOC "
    "pistols pothole Raccoons ShellfishOpenImages thermalDogsAndPeople VehiclesOpenImages"
).split()
THIRTEEN = tuple(
    replace(data_set, plain=True, vocabulary=name, name=OLDER_NAMES.get(name, name))
    for name in THIRTEEN_OF_THEM
    for data_set in THIRTY_FIVE
    if data_set.name == name
)
SUITES = {"13": THIRTEEN, "35": THIRTY_FIVE}


@dataclass(frozen=True)
class OdinwDetection:
    """One data set of the suite."""

    truth: coco.CocoTruth
    prompt: Vocabulary
    images: Path
    path: Path

    @classmethod
    def load(cls, data_set: DataSet, root: Path) -> "OdinwDetection":
        """From below the suite's folder.

        Raises:
            ValueError: if the annotation file is missing, damaged or lacks a category.
        """
        images = root / data_set.folder
        path = annotation_path(data_set, root)
        document = read_document(path, "images", "annotations", "categories")
        ids = {category["name"]: category["id"] for category in document["categories"]}
        vocabulary = read_vocabulary(f"odinw/{data_set.vocabulary or data_set.name}")
        names = vocabulary.shown
        chosen = [ids.get(name, ids.get(one.texts[0])) for name, one in zip(names, vocabulary.names, strict=True)]
        missing = [name for name, category_id in zip(names, chosen, strict=True) if category_id is None]
        if missing:
            raise ValueError(f"{path}: no category {', '.join(map(repr, missing))}; it has {', '.join(map(repr, ids))}")
        category_ids = tuple(category_id for category_id in chosen if category_id is not None)
        prompt = plain_names(names) if data_set.plain else vocabulary
        return cls(coco.CocoTruth(document, category_ids, names), prompt, images, path)

    def questions(self) -> Sequence[Question]:
        """Each image with the prompt."""
        prompts, images = (self.prompt,), self.truth.document["images"]
        return [Question(image_file(self.images, image, self.path), prompts, (image["id"],)) for image in images]

    def score(self, answers: Iterable[ImageAnswer]) -> Figures:
        """COCO's figures."""
        return coco.score(self.truth, answers)

    def picture(self, image_id: int) -> tuple[Path, Floats, Integers, tuple[str, ...]]:
        """For pictures: the file, its annotated boxes (N, 4), their labels (N,), and the names of all labels."""
        return (self.images / self.truth.images[image_id]["file_name"], *self.truth.boxes(image_id), self.truth.names)

    def description(self) -> dict[str, str]:
        """The protocol spelled out, for reports."""
        (first, *others), count = self.prompt.texts, len(self.prompt.names)
        names = f"{count} category names" if others or "[" not in first else f'"{first}", of it what is in brackets'
        return {
            "figures": "COCO AP (pycocotools) of the validation split, at most 100 boxes per image and category",
            "prompt": names,
            "boxes": "300 best box-category pairs of each caption, no NMS",
        }


def annotation_path(data_set: DataSet, root: Path) -> Path:
    """Of a data set; `new_` files (written by mmdet's renaming tool) may be missing where the plain one is there."""
    path = root / data_set.folder / data_set.annotations
    plain = path.with_name(path.name.removeprefix("new_"))
    return plain if plain.exists() and not path.exists() else path


def average(suite: str, figures: Mapping[str, Figures], missing: Sequence[str]) -> Figures:
    """The mean AP of the data sets that were evaluated, and each one's; names the missing ones in a note."""
    aps = {name: one.values["AP"] for name, one in figures.items()}
    notes = []
    if missing:
        notes.append(
            f"average of {len(aps)} of {suite} data sets, not comparable with a published one; missing: "
            + ", ".join(missing)
        )
    mean = float(np.mean(list(aps.values()))) if aps else float("nan")
    return Figures({"average AP": mean, **aps}, notes=tuple(notes))
