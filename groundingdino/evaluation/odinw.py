"""Object Detection in the Wild: 13 or 35 small data sets, each scored as COCO, and their average.

Names, prompts and folders are those of mmdetection's `configs/mm_grounding_dino/odinw`: the 13 are prompted by their
plain names; of the 35, three have words around their name, and some categories are renamed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from groundingdino.evaluation import coco
from groundingdino.evaluation.annotation_file import image_path, read_document
from groundingdino.evaluation.answers import Floats, ImageAnswer, Integers
from groundingdino.evaluation.report import Figures
from groundingdino.evaluation.runner import Question
from groundingdino.inference.prompts import Categories, Prompt, Spans

PLAIN = "annotations_without_background.json"


@dataclass(frozen=True)
class DataSet:
    """One data set of the suite: its validation split below the data root."""

    name: str
    folder: str  # of the images; `annotations` is in it
    names: str  # of the categories as they are prompted, separated by ", "
    annotations: str = PLAIN
    renamed: Mapping[str, str] = field(default_factory=dict)  # prompted name -> name in the annotation file
    around: tuple[str, str, str] | None = None  # prefix, name and suffix of the only category's caption


AERIAL = "boat, car, dock, jetski, lift"
VOC = (
    "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike, person, "
    "pottedplant, sheep, sofa, train, tvmonitor"
)
FISH = "fish, jellyfish, penguin, puffin, shark, starfish, stingray"
FONTS = (
    "American Typewriter, Andale Mono, Apple Chancery, Arial, Avenir, Baskerville, Big Caslon, Bradley Hand, Brush "
    "Script MT, Chalkboard, Comic Sans MS, Copperplate, Courier, Didot, Futura, Geneva, Georgia, Gill Sans, "
    "Helvetica, Herculanum, Impact, Kefa, Lucida Grande, Luminari, Marker Felt, Menlo, Monaco, Noteworthy, Optima, "
    "PT Sans, PT Serif, Palatino, Papyrus, Phosphate, Rockwell, SF Pro, SignPainter, Skia, Snell Roundhand, Tahoma,"
    " Times New Roman, Trebuchet MS, Verdana"
)
BREEDS = (
    "cat-Abyssinian, cat-Bengal, cat-Birman, cat-Bombay, cat-British_Shorthair, cat-Egyptian_Mau, cat-Maine_Coon, "
    "cat-Persian, cat-Ragdoll, cat-Russian_Blue, cat-Siamese, cat-Sphynx, dog-american_bulldog, dog-"
    "american_pit_bull_terrier, dog-basset_hound, dog-beagle, dog-boxer, dog-chihuahua, dog-english_cocker_spaniel,"
    " dog-english_setter, dog-german_shorthaired, dog-great_pyrenees, dog-havanese, dog-japanese_chin, dog-"
    "keeshond, dog-leonberger, dog-miniature_pinscher, dog-newfoundland, dog-pomeranian, dog-pug, dog-"
    "saint_bernard, dog-samoyed, dog-scottish_terrier, dog-shiba_inu, dog-staffordshire_bull_terrier, dog-"
    "wheaten_terrier, dog-yorkshire_terrier"
)
LEAVES = (
    "Apple Scab Leaf, Apple leaf, Apple rust leaf, Bell_pepper leaf, Bell_pepper leaf spot, Blueberry leaf, Cherry "
    "leaf, Corn Gray leaf spot, Corn leaf blight, Corn rust leaf, Peach leaf, Potato leaf, Potato leaf early "
    "blight, Potato leaf late blight, Raspberry leaf, Soyabean leaf, Soybean leaf, Squash Powdery mildew leaf, "
    "Strawberry leaf, Tomato Early blight leaf, Tomato Septoria leaf spot, Tomato leaf, Tomato leaf bacterial spot,"
    " Tomato leaf late blight, Tomato leaf mosaic virus, Tomato leaf yellow virus, Tomato mold leaf, Tomato two "
    "spotted spider mites leaf, grape leaf, grape leaf black rot"
)
LIGHTS = (
    "biker, car, pedestrian, trafficLight, trafficLight-Green, trafficLight-GreenLeft, trafficLight-Red, "
    "trafficLight-RedLeft, trafficLight-Yellow, trafficLight-YellowLeft, truck"
)
PIECES = (
    "black bishop, black king, black knight, black pawn, black queen, black rook, white bishop, white king, white "
    "knight, white pawn, white queen, white rook"
)  # mmdet also lists a category of two spaces, which no prompt can name
BOGGLE = (
    "Q, a, an, b, c, d, e, er, f, g, h, he, i, in, j, k, l, m, n, o, o , p, q, qu, r, s, t, t\\, th, u, v, w, wild, "
    "x, y, z"
)
VEHICLES = "Ambulance, Bus, Car, Motorcycle, Truck"
MUSHROOMS = "NorthAmericaMushrooms/North American Mushrooms.v1-416x416.coco/valid"
HANDS = "follow, follow_hand, land, land_hand, null, object, takeoff, takeoff-hand"
PAGES = "button, field, heading, iframe, image, label, link, text"

THIRTEEN = (
    DataSet("AerialMaritimeDrone", "AerialMaritimeDrone/large/valid", AERIAL),
    DataSet("Aquarium", "Aquarium/Aquarium Combined.v2-raw-1024.coco/valid", FISH),
    DataSet("CottontailRabbits", "CottontailRabbits/valid", "Cottontail-Rabbit"),
    DataSet("EgoHands", "EgoHands/generic/valid", "hand"),
    DataSet("NorthAmericaMushrooms", MUSHROOMS, "CoW, chanterelle"),
    DataSet("Packages", "Packages/Raw/valid", "package"),
    DataSet("PascalVOC", "PascalVOC/valid", VOC),
    DataSet("pistols", "pistols/export", "pistol", f"val_{PLAIN}"),
    DataSet("pothole", "pothole/valid", "pothole"),
    DataSet("Raccoon", "Raccoon/Raccoon.v2-raw.coco/valid", "raccoon"),
    DataSet("ShellfishOpenImages", "ShellfishOpenImages/raw/valid", "Crab, Lobster, Shrimp"),
    DataSet("thermalDogsAndPeople", "thermalDogsAndPeople/valid", "dog, person"),
    DataSet("VehiclesOpenImages", "VehiclesOpenImages/416x416/valid", VEHICLES),
)
_LETTERS = "AmericanSignLanguageLetters/American Sign Language Letters.v1-v1.coco/valid"
_MUSHROOM_NAMES = {"flat mushroom": "CoW", "yellow mushroom": "chanterelle"}
THIRTY_FIVE = (
    DataSet("AerialMaritimeDrone_large", "AerialMaritimeDrone/large/valid", AERIAL),
    DataSet("AerialMaritimeDrone_tiled", "AerialMaritimeDrone/tiled/valid", AERIAL),
    DataSet("AmericanSignLanguageLetters", _LETTERS, ", ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ")),
    DataSet("Aquarium", "Aquarium/Aquarium Combined.v2-raw-1024.coco/valid", FISH),
    DataSet("BCCD", "BCCD/BCCD.v3-raw.coco/valid", "Platelets, RBC, WBC"),
    DataSet("boggleBoards", "boggleBoards/416x416AutoOrient/export", BOGGLE, f"val_{PLAIN}"),
    DataSet(
        "brackishUnderwater", "brackishUnderwater/960x540/valid", "crab, fish, jellyfish, shrimp, small_fish, starfish"
    ),
    DataSet("ChessPieces", "ChessPieces/Chess Pieces.v23-raw.coco/valid", PIECES, f"new_{PLAIN}"),
    DataSet("CottontailRabbits", "CottontailRabbits/valid", "rabbit", renamed={"rabbit": "Cottontail-Rabbit"}),
    DataSet("dice", "dice/mediumColor/export", "1, 2, 3, 4, 5, 6", f"val_{PLAIN}"),
    DataSet("DroneControl", "DroneControl/Drone Control.v3-raw.coco/valid", HANDS),
    DataSet("EgoHands_generic", "EgoHands/generic/valid", "hand", around=("", "hand", " of a person")),
    DataSet("EgoHands_specific", "EgoHands/specific/valid", "myleft, myright, yourleft, yourright"),
    DataSet("HardHatWorkers", "HardHatWorkers/raw/valid", "head, helmet, person"),
    DataSet("MaskWearing", "MaskWearing/raw/valid", "mask, no-mask"),
    DataSet("MountainDewCommercial", "MountainDewCommercial/valid", "bottle"),
    DataSet("NorthAmericaMushrooms", MUSHROOMS, "flat mushroom, yellow mushroom", renamed=_MUSHROOM_NAMES),
    DataSet("openPoetryVision", "openPoetryVision/512x512/valid", FONTS),
    DataSet("OxfordPets_by_breed", "OxfordPets/by-breed/valid", BREEDS),
    DataSet("OxfordPets_by_species", "OxfordPets/by-species/valid", "cat, dog"),
    DataSet("PKLot", "PKLot/640/valid", "space-empty, space-occupied"),
    DataSet("Packages", "Packages/Raw/valid", "package", around=("there is a ", "package", " on the porch")),
    DataSet("PascalVOC", "PascalVOC/valid", VOC),
    DataSet("pistols", "pistols/export", "pistol", f"val_{PLAIN}"),
    DataSet("plantdoc", "plantdoc/416x416/valid", LEAVES),
    DataSet("pothole", "pothole/valid", "pothole", around=("there are some ", "holes", " on the road")),
    DataSet("Raccoons", "Raccoon/Raccoon.v2-raw.coco/valid", "raccoon"),
    DataSet("selfdrivingCar", "selfdrivingCar/fixedLarge/export", LIGHTS, f"val_{PLAIN}"),
    DataSet("ShellfishOpenImages", "ShellfishOpenImages/raw/valid", "Crab, Lobster, Shrimp"),
    DataSet("ThermalCheetah", "ThermalCheetah/valid", "cheetah, human"),
    DataSet("thermalDogsAndPeople", "thermalDogsAndPeople/valid", "dog, person"),
    DataSet("UnoCards", "UnoCards/raw/valid", ", ".join(map(str, range(15)))),
    DataSet("VehiclesOpenImages", "VehiclesOpenImages/416x416/valid", VEHICLES),
    DataSet("WildfireSmoke", "WildfireSmoke/valid", "smoke"),
    DataSet("websiteScreenshots", "websiteScreenshots/valid", PAGES),
)
SUITES = {"13": THIRTEEN, "35": THIRTY_FIVE}


@dataclass(frozen=True)
class OdinwDetection:
    """One data set of the suite."""

    data_set: DataSet
    truth: coco.CocoTruth
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
        names = tuple(data_set.names.split(", "))
        chosen = [ids.get(name, ids.get(data_set.renamed.get(name, name))) for name in names]
        missing = [name for name, category_id in zip(names, chosen, strict=True) if category_id is None]
        if missing:
            raise ValueError(f"{path}: no category {', '.join(map(repr, missing))}; it has {', '.join(map(repr, ids))}")
        category_ids = tuple(category_id for category_id in chosen if category_id is not None)
        return cls(data_set, coco.CocoTruth(document, category_ids, names), images, path)

    @property
    def prompt(self) -> Prompt:
        """Its names, or the one name between its words."""
        if self.data_set.around is None:
            return Categories(self.truth.names)
        prefix, name, suffix = self.data_set.around
        return Spans(prefix + name + suffix, [[(len(prefix), len(prefix) + len(name))]])

    def questions(self) -> Sequence[Question]:
        """Each image with the prompt."""
        prompts, images = (self.prompt,), self.truth.document["images"]
        return [Question(image_path(self.images, image, self.path), prompts, (image["id"],)) for image in images]

    def score(self, answers: Iterable[ImageAnswer]) -> Figures:
        """COCO's figures."""
        return coco.score(self.truth, answers)

    def picture(self, image_id: int) -> tuple[Path, Floats, Integers, tuple[str, ...]]:
        """For pictures: the file, its annotated boxes (N, 4), their labels (N,), and the names of all labels."""
        return (self.images / self.truth.images[image_id]["file_name"], *self.truth.boxes(image_id), self.truth.names)

    def description(self) -> dict[str, str]:
        """The protocol spelled out, for reports."""
        around = self.data_set.around
        names = (
            f"{len(self.truth.names)} category names" if around is None else f'"{"".join(around)}", of it "{around[1]}"'
        )
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
