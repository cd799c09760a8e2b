"""Evaluate a checkpoint on referring expressions.

    groundingdino evaluate --split testA                    the best checkpoint of training on RefCOCO testA
    groundingdino evaluate --checkpoint FILE --split val --save-pictures 20     with the 20 worst misses as pictures
    torchrun --nproc_per_node=8 evaluate.py --split testB   the same figures, on 8 devices

Prints Precision@1/5/10 and a class-agnostic COCO AP in percent, and writes them as JSON with the protocol named.
Exit code 2: something that you can fix, in one line.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from groundingdino.cli import console

if TYPE_CHECKING:
    from groundingdino.data import Expression
    from groundingdino.evaluation import Evaluation, ReferringFigures
    from groundingdino.runtime.distributed import World


@dataclass(frozen=True)
class Arguments:
    """What to evaluate, and how."""

    split: str = "val"
    """val, testA or testB; test for refcocog"""
    checkpoint: Path = Path("runs/refcoco/best.safetensors")
    """a checkpoint of ours, from training or convert_checkpoint.py"""
    data_root: Path = Path("refcoco")
    """holds train2014/ and mdetr_annotations/finetune_{dataset}_{split}.json"""
    dataset: Literal["refcoco", "refcoco+", "refcocog"] = "refcoco"
    annotations: Path | None = None
    """another annotation file in MDETR's format, such as final_refexp_val.json"""
    images: str = "train2014"
    """folder of the photographs below the data root"""
    device: str = "auto"
    """auto, cpu, cuda, npu"""
    batch_size: int | None = None
    """sentences of one photograph that run together; default: 1 on a CPU, else 4"""
    scoring: Literal["max", "subject"] = "max"
    """a box scores by its best token, as in mmdet, or by the words of the sentence's subject"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    scale: tuple[int, int] | None = None
    """most pixels of an image's short and long side; default: what the checkpoint was trained for, else 800 1333"""
    workers: int = 2
    """processes per device that load photographs"""
    output: Path | None = None
    """folder of the JSON file and the pictures; default: evaluation/ beside the checkpoint"""
    save_pictures: int = 0
    """draw this many misses, the worst first, ground truth beside prediction"""

    @property
    def annotation_file(self) -> Path:
        """Where the expressions are."""
        return self.annotations or self.data_root / "mdetr_annotations" / f"finetune_{self.dataset}_{self.split}.json"

    @property
    def folder(self) -> Path:
        """Where results go."""
        return self.output or self.checkpoint.parent / "evaluation"

    @property
    def name(self) -> str:
        """Of the results."""
        return self.annotations.stem if self.annotations else f"{self.dataset}_{self.split}"


def missing(arguments: Arguments) -> str | None:
    """One line about what is not there and how to get it; None where all is."""
    folder = arguments.data_root / arguments.images
    if not arguments.checkpoint.is_file():
        return (
            f"no checkpoint at {arguments.checkpoint.absolute()}: train one (train.py), convert one "
            "(convert_checkpoint.py IN.pth OUT.safetensors), or name it with --checkpoint"
        )
    lost = [str(path) for path in (folder, arguments.annotation_file) if not path.exists()]
    if lost:
        return (
            f"data not found: {', '.join(lost)} (looked below {arguments.data_root.absolute()}); "
            "images: COCO train2014 (http://images.cocodataset.org/zips/train2014.zip), "
            "annotations: MDETR's mdetr_annotations.tar.gz (https://zenodo.org/records/4729015); "
            "another place: --data-root DIR"
        )
    return None


def evaluate(arguments: Arguments, world: "World", say: Any) -> None:
    """Load, evaluate, print and write. ValueError or OSError in one line for what the user can mend."""
    from tqdm import tqdm

    from groundingdino.checkpoints.model_file import image_scale, load_detector
    from groundingdino.data import load_expressions
    from groundingdino.evaluation import EvaluationOptions, ReferringProtocol, evaluate_referring
    from groundingdino.inputs.images import DEFAULT_SCALE
    from groundingdino.runtime import distributed

    scale = arguments.scale or image_scale(arguments.checkpoint, DEFAULT_SCALE)
    options = EvaluationOptions(arguments.batch_size, arguments.precision, scale, arguments.workers)
    expressions = load_expressions(arguments.annotation_file)
    protocol = ReferringProtocol(expressions, arguments.data_root / arguments.images, arguments.scoring)
    model = load_detector(arguments.checkpoint, world.device)
    total = -(-len(expressions) // world.size)  # of this process, about
    with tqdm(total=total, unit=" sentences", disable=not distributed.is_main() or None) as bar:
        evaluation = evaluate_referring(
            model,
            protocol,
            options,
            device=world.device,
            name=str(arguments.checkpoint),
            progress=lambda count: bar.update(count),
        )
    if distributed.is_main():
        report(arguments, evaluation, expressions, world, say)


def report(
    arguments: Arguments,
    evaluation: "Evaluation[ReferringFigures]",
    expressions: "tuple[Expression, ...]",
    world: "World",
    say: Any,
) -> None:
    """Print the table, write the JSON file and the pictures."""
    from groundingdino.evaluation import referring
    from groundingdino.evaluation.misses import save_misses
    from groundingdino.runtime.files import write_text

    release = release_of(arguments.checkpoint)
    content = {
        "checkpoint": str(arguments.checkpoint),
        "release": release,
        "annotations": str(arguments.annotation_file),
        "device": str(world.device),
        "processes": world.size,
        **referring.report(evaluation),
        "published": {
            name: published_row(arguments, evaluation.options.scale, release, name)
            for name in evaluation.figures.precision
        },
    }
    path = arguments.folder / f"{arguments.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")
    for line in table(content, arguments.split):
        say(line)
    say(f"report: {path}")
    if arguments.save_pictures > 0:
        folder = arguments.folder / f"{arguments.name}_misses"
        images = arguments.data_root / arguments.images
        saved = save_misses(expressions, evaluation.figures.answers, images, folder, arguments.save_pictures)
        say(f"pictures: {len(saved)} of the misses in {folder}, the worst first")


def release_of(checkpoint: Path) -> str | None:
    """The released checkpoint that a file was converted from, if it is one."""
    from groundingdino.checkpoints.model_file import SOURCE_KEY, read_metadata

    release = json.loads(read_metadata(checkpoint).get(SOURCE_KEY, "{}")).get("release")
    return release if isinstance(release, str) else None


def published_row(
    arguments: Arguments, scale: tuple[int, int], release: str | None, data_set: str
) -> list[float] | None:
    """Published Precision@1/5/10 in percent where they were measured as we did: same split, scoring and image size."""
    from groundingdino.checkpoints.zoo import published
    from groundingdino.inputs.images import DEFAULT_SCALE

    same = arguments.scoring == "max" and scale == DEFAULT_SCALE
    row = published(release, f"{data_set} {arguments.split}") if same and arguments.annotations is None else None
    return list(row) if row else None


def table(content: dict[str, Any], split: str) -> list[str]:
    """The figures in percent, a line a data set, the published ones below."""
    rate = content["prompts"] / max(content["seconds"], 1e-9)
    lines = [
        f"{content['checkpoint']}{' = ' + content['release'] if content['release'] else ''}: "
        f"{content['prompts']} expressions about {content['images']} images, {rate:.2f} a second",
        f"scoring {content['protocol']['scoring']}",
        f"{'':28}{'P@1':>8}{'P@5':>8}{'P@10':>8}{'AP':>8}",
    ]
    for name, row in content["precision"].items():
        figures = [100 * row[k] for k in ("1", "5", "10")]
        average = f"{100 * content['average_precision']:8.2f}" if len(content["precision"]) == 1 else f"{'':8}"
        lines.append(f"{f'{name} {split}, measured':28}" + "".join(f"{x:8.2f}" for x in figures) + average)
        published = content["published"][name]
        if published:
            lines.append(f"{f'{name} {split}, published':28}" + "".join(f"{x:8.1f}" for x in published))
    if len(content["precision"]) > 1:
        lines.append(f"{'all together':28}{'':24}{100 * content['average_precision']:8.2f}")
    return lines


def run(arguments: Arguments) -> int:
    """The exit code."""
    problem = missing(arguments)
    if problem is not None:
        raise ValueError(problem)
    console.require(["pycocotools"], "train")
    from groundingdino.runtime import devices, distributed  # from here on it is slow to import: torch and all

    def say(line: str) -> None:
        if distributed.is_main():
            print(line, flush=True)

    device = devices.pick_device(arguments.device)
    devices.tune_process(device)
    try:
        evaluate(arguments, distributed.init(str(device)), say)
    finally:
        distributed.shutdown()
    return 0


def main(arguments: Sequence[str], prog: str = "groundingdino evaluate") -> int:
    """The exit code."""
    return console.run(prog, lambda: run(console.parse(Arguments, arguments, prog, description=__doc__)))
