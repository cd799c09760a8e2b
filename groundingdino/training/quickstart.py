"""Around the quick start's training: render its data before, show that language was learned after."""

import dataclasses
import json
import logging
import random
from pathlib import Path

from groundingdino.checkpoints import model_file
from groundingdino.config import TrainConfig
from groundingdino.data.synthetic_refcoco import SUMMARY_FILE, write_dataset
from groundingdino.runtime import distributed
from groundingdino.runtime.distributed import World
from groundingdino.runtime.files import write_text
from groundingdino.training.trainer import FitResult
from groundingdino.training.validation import Assessor

HELD_OUT = "testA"  # a split that nothing was chosen by
SHUFFLED = "mdetr_annotations/finetune_refcoco_testA_shuffled.json"

logger = logging.getLogger(__name__)


def make_data(config: TrainConfig) -> None:
    """Render the scenes below `config.data.root` unless they are there; in the main process, the others wait."""
    root = config.data.root
    if distributed.is_main():
        if not (root / SUMMARY_FILE).is_file():
            logger.info(f"rendering scenes with referring expressions into {root}")
        write_dataset(root)
        shuffle_captions(root / f"mdetr_annotations/finetune_refcoco_{HELD_OUT}.json", root / SHUFFLED)
    distributed.barrier()


def shuffle_captions(source: Path, target: Path) -> None:
    """Write `target`: the images and boxes of `source`, each with the caption of another image."""
    document = json.loads(source.read_text())
    images = document["images"]
    order = list(range(len(images)))
    random.Random(0).shuffle(order)
    captions = [image["caption"] for image in images]
    for place, other in enumerate(order):
        following = order[(place + 1) % len(order)]
        images[other]["caption"] = captions[following]
    for annotation in document["annotations"]:
        annotation["tokens_positive"] = [[0, len(images[annotation["image_id"]]["caption"])]]
    write_text(target, json.dumps(document))


def report(config: TrainConfig, world: World, result: FitResult) -> dict[str, float]:
    """Precision@1 of the best checkpoint on held-out scenes, with the right and with shuffled captions; logs both."""
    right = f"mdetr_annotations/finetune_refcoco_{HELD_OUT}.json"
    evaluation = (("held-out", right), ("shuffled", SHUFFLED))
    asked = dataclasses.replace(config, data=dataclasses.replace(config.data, evaluation=evaluation))
    model = model_file.load_detector(result.files["best"], world.device)
    figures = Assessor(asked).assess(model).figures
    chance = json.loads((config.data.root / SUMMARY_FILE).read_text())["splits"][HELD_OUT]["chance"]
    found = {name: values["precision@1"] for name, values in figures.items()} | {"chance": chance}
    logger.info(
        f"Precision@1 on held-out scenes: {found['held-out']:.3f}; with the captions shuffled among the images: "
        f"{found['shuffled']:.3f}; any object at random: {chance:.3f}"
    )
    return found
