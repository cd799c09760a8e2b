"""D-cube (described object detection): AP of sentences, each sought in every image of its group."""

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from groundingdino.evaluation import coco
from groundingdino.evaluation.annotation_file import ImageFile, image_file, read_document
from groundingdino.evaluation.answers import Floats, ImageAnswer, Integers
from groundingdino.evaluation.report import Figures
from groundingdino.evaluation.runner import Question
from groundingdino.inference.prompts import Categories

SUBSETS = {"full": "d3_full_annotations", "presence": "d3_pres_annotations", "absence": "d3_abs_annotations"}
LENGTHS = {"short": range(0, 4), "middle": range(4, 7), "long": range(7, 10), "very long": range(10, 1000)}  # words


@dataclass(frozen=True)
class DescribedImage:
    """An image of D-cube, and the sentences of its group."""

    image_id: int
    file: ImageFile
    sentence_ids: tuple[int, ...]  # label l of its answer is number l


@dataclass(frozen=True)
class DescribedDetection:
    """D-cube. "concat" puts the sentences of an image into one caption, "parallel" asks one by one."""

    images: tuple[DescribedImage, ...]
    sentences: Mapping[int, str]
    subsets: Mapping[str, coco.CocoTruth]  # by the names of `SUBSETS`
    parallel: bool

    @classmethod
    def load(cls, root: Path, parallel: bool) -> "DescribedDetection":
        """Of the folder that holds d3_images/, d3_pkl/ and d3_json/.

        Raises:
            ValueError: naming a file that is missing or holds something else.
        """
        groups, sentences, images = (
            read_plain_pickle(root / "d3_pkl" / f"{n}.pkl") for n in ("groups", "sentences", "images")
        )
        described = []
        for image_id, image in images.items():
            file = image_file(root / "d3_images", image, root / "d3_pkl" / "images.pkl")
            own = sorted({int(sentence) for sentence in groups[image["group_id"]]["inner_sent_id"]})
            described.append(DescribedImage(int(image_id), file, tuple(own)))
        subsets = {}
        for name, stem in SUBSETS.items():
            document = read_document(root / "d3_json" / f"{stem}.json", "images", "annotations", "categories")
            subsets[name] = coco.CocoTruth.from_document(document)
        texts = {int(number): str(sentence["raw_sent"]) for number, sentence in sentences.items()}
        return cls(tuple(described), texts, subsets, parallel)

    def questions(self) -> Sequence[Question]:
        """Each image with the sentences of its group, group after group: the captions of a group are encoded once."""
        prompts: dict[tuple[int, ...], tuple[Categories, ...]] = {}  # images of one group share their prompt
        result = []
        for image in sorted(self.images, key=lambda image: image.sentence_ids):
            if image.sentence_ids not in prompts:
                names = [self.sentences[number] for number in image.sentence_ids]
                prompts[image.sentence_ids] = (Categories(names, 1 if self.parallel else None),)
            result.append(Question(image.file, prompts[image.sentence_ids], (image.image_id,)))
        return result

    def score(self, answers: Iterable[ImageAnswer]) -> Figures:
        """COCO's AP of the full, presence and absence sentences, and of the full ones by their number of words."""
        sentence_ids = {image.image_id: np.array(image.sentence_ids) for image in self.images}
        scored = {name: _Subset(truth) for name, truth in self.subsets.items()}
        for answer in answers:
            sentences = sentence_ids[answer.image_id][answer.labels]
            for subset in scored.values():
                subset.add(answer, sentences)
        figures = {name: subset.accumulator.figures() for name, subset in scored.items()}
        values = {f"{name} {figure}": values for name, f in figures.items() for figure, values in f.values.items()}
        headline = [f"{name} AP" for name in SUBSETS]
        rest = {name: value for name, value in values.items() if name not in headline}
        by_length = length_figures(figures["full"].per_category)
        return Figures({**{name: values[name] for name in headline}, **by_length, **rest}, figures["full"].per_category)

    def picture(self, image_id: int) -> tuple[Path, Floats, Integers, tuple[str, ...]]:
        """For pictures: the file, its annotated boxes (N, 4), their labels (N,), and the names of all labels."""
        image, truth = self._by_id[image_id], self.subsets["full"]
        boxes, labels = truth.boxes(image_id)
        sentence_ids = [truth.category_ids[label] for label in labels.tolist()]
        own = np.array([sentence in image.sentence_ids for sentence in sentence_ids], bool)
        places = [image.sentence_ids.index(sentence) for sentence in sentence_ids if sentence in image.sentence_ids]
        names = tuple(self.sentences[number] for number in image.sentence_ids)
        return image.file.path, boxes[own], np.array(places, np.int64), names

    @cached_property
    def _by_id(self) -> dict[int, DescribedImage]:
        return {image.image_id: image for image in self.images}

    def description(self) -> dict[str, str]:
        """The protocol spelled out, for reports."""
        way = "each sentence a caption of its own (parallel)" if self.parallel else "one caption (concat)"
        return {
            "figures": "COCO AP (pycocotools), a sentence being a category, of all sentences and of those that "
            "describe what is there (presence) and what is not (absence)",
            "prompt": f"the sentences of the image's group, {way}",
            "boxes": "300 best box-sentence pairs of each caption, no NMS",
        }


class _Subset:
    def __init__(self, truth: coco.CocoTruth) -> None:
        self.accumulator = coco.CocoAccumulator(truth)
        self.images = {image["id"] for image in truth.document["images"]}
        self.numbers = {category: label for label, category in enumerate(truth.category_ids)}

    def add(self, answer: ImageAnswer, sentences: Any) -> None:
        """Count in the boxes of this subset's sentences; `sentences` is the id of each box's."""
        if answer.image_id in self.images:
            labels = np.array([self.numbers.get(sentence, -1) for sentence in sentences.tolist()], np.int64)
            own = labels >= 0
            self.accumulator.add(ImageAnswer(answer.image_id, answer.boxes[own], answer.scores[own], labels[own]))


def length_figures(per_sentence: Sequence[tuple[str, float]]) -> dict[str, float]:
    """AP of the sentences of each range of words (mmdet `dod_metric.py`), NaN for a range without any."""
    result = {}
    for name, words in LENGTHS.items():
        found = [ap for sentence, ap in per_sentence if len(sentence.split(" ")) in words and not np.isnan(ap)]
        result[f"full AP, {name}"] = float(np.mean(found)) if found else float("nan")
    return result


class _PlainData(pickle.Unpickler):
    """Reads numbers, strings, lists, dicts and numpy arrays; anything else is refused, so no code runs."""

    ALLOWED = frozenset({"_reconstruct", "scalar", "ndarray", "dtype"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not plain data")


def read_plain_pickle(path: Path) -> dict[Any, Any]:
    """A pickled dict of plain data. ValueError, naming the file, if it is missing or holds anything else."""
    try:
        with path.open("rb") as file:
            content = _PlainData(file).load()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise ValueError(f"{path}: not a pickle of plain data ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict, found {type(content).__name__}")
    return content
