"""Evaluate a checkpoint by a published protocol.

    groundingdino evaluate --split testA                    the best checkpoint of training on RefCOCO testA
    groundingdino evaluate coco --checkpoint FILE --data-root DIR       COCO val2017; the published figures beside
    groundingdino evaluate lvis --split val --checkpoint FILE --resume  go on where an evaluation was interrupted
    groundingdino evaluate retention --before coco.json --after tuned/coco.json     two reports in one table
    groundingdino evaluate coco --base mm-gdino-t --alpha 0 0.25 0.5 0.75 1     mixtures of weights before and after
    torchrun --nproc_per_node=8 evaluate.py --split testB   the same figures, on 8 devices

PROTOCOL is refcoco (default), refcoco+, refcocog, refexp (the three in one file), grefcoco, coco, lvis, flickr30k,
odinw, dod (D-cube) or retention. Prints the figures in percent and writes them as JSON with the protocol spelled out;
the answers stay beside it, so that --score FILE computes the figures again without the model.
Exit code 2: something that you can fix, in one line.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from groundingdino.cli import console, loading

if TYPE_CHECKING:
    from groundingdino.evaluation import Evaluation, EvaluationOptions
    from groundingdino.evaluation.runner import EvaluationProtocol
    from groundingdino.runtime.distributed import World

REFERRING = ("refcoco", "refcoco+", "refcocog", "refexp")
Name = Literal[
    "refcoco", "refcoco+", "refcocog", "refexp", "grefcoco", "coco", "lvis", "flickr30k", "odinw", "dod", "retention"
]
FINGERPRINT_BYTES = 1 << 20  # of a checkpoint's end


@dataclass(frozen=True)
class Arguments:
    """What to evaluate, and how."""

    protocol: tyro.conf.Positional[Name] = "refcoco"
    """see above"""
    split: str | None = None
    """refcoco, refcoco+, grefcoco: val, testA, testB; refcocog: val, test; coco: val2017, val2017-48-17; lvis: minival,
    val; flickr30k: val, test; odinw: 13, 35; dod: concat, parallel; default: the first"""
    checkpoint: Path = Path("runs/refcoco/best.safetensors")
    """a checkpoint of ours, other weights, or the name of a release (`groundingdino models`)"""
    data_root: Path | None = None
    """holds the images and annotations in the protocol's own layout; default: refcoco, coco, flickr30k, odinw or d3"""
    dataset: Literal["refcoco", "refcoco+", "refcocog"] | None = None
    """older name of PROTOCOL"""
    annotations: Path | None = None
    """another annotation file of the protocol's format, such as any COCO json"""
    images: str | None = None
    """another folder of images below the data root"""
    names_per_caption: int | None = None
    """lvis: names in one caption; default 40, as published; 0: as many as fit"""
    names: str | None = None
    """coco: prompts of its categories, from names.yaml or a packaged list; others are prompted by their name"""
    device: str = "auto"
    """auto, cpu, cuda, npu"""
    batch_size: int | None = None
    """captions of one image that run together; default: 1 on a CPU, else 4"""
    scoring: Literal["max", "subject", "llmdet"] = "max"
    """expressions: a box scores by its best token, as in mmdet; by the words of the sentence's subject; or as in
    LLMDet, by its subject and by how near it is to the sides that the sentence names"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    scale: tuple[int, int] | None = None
    """most pixels of an image's short and long side; default: what the checkpoint was trained for, else 800 1333"""
    workers: int = 2
    """processes per device that load images"""
    output: Path | None = None
    """folder of the report, the answers and the pictures; default: evaluation/ beside the checkpoint"""
    resume: bool = False
    """keep the answers of an evaluation that was interrupted"""
    score: Path | None = None
    """compute the figures from this file of answers, without the model"""
    floor: bool = False
    """expressions: also print what answering without a model scores"""
    save_pictures: int = 0
    """draw this many images with misses, the worst first, ground truth beside prediction"""
    alpha: tuple[float, ...] = ()
    """evaluate mixtures: this much of --checkpoint, 0 to 1, the rest of --base; also draws the curve"""
    base: Path | None = None
    """with --alpha: the weights that --checkpoint was fine-tuned from"""
    before: tuple[Path, ...] = ()
    """retention: reports before the fine-tune"""
    after: tuple[Path, ...] = ()
    """retention: reports after it"""

    @property
    def name(self) -> str:
        """Of the protocol."""
        return self.dataset if self.dataset and self.protocol == "refcoco" else self.protocol

    @property
    def folder(self) -> Path:
        """Where results go."""
        return self.output or self.checkpoint.parent / "evaluation"


@dataclass(frozen=True)
class Session:
    """What the evaluations of one command share."""

    arguments: Arguments
    world: "World"
    model: Any  # a GroundingDINO; None with --score
    options: "EvaluationOptions"
    mixture: str | None = None  # what part of the model's weights is the checkpoint's, where it is not all


def missing_checkpoint(arguments: Arguments) -> str | None:
    """One line about what is not there and how to get it; None where all is."""
    if arguments.checkpoint.exists() or loading.is_name(arguments.checkpoint) or arguments.score is not None:
        return None
    return (
        f"no checkpoint at {arguments.checkpoint.absolute()}: train one (train.py), convert one "
        "(convert_checkpoint.py IN.pth OUT.safetensors), or name it with --checkpoint"
    )


def open_session(arguments: Arguments, world: "World") -> Session:
    """The model, and how it is run. ValueError for a checkpoint that is none."""
    from groundingdino.checkpoints.model_file import image_scale, load_detector
    from groundingdino.evaluation import EvaluationOptions
    from groundingdino.inputs.images import DEFAULT_SCALE

    if arguments.score is not None:
        from groundingdino.evaluation.answer_file import read_answers

        header, _ = read_answers(arguments.score)
        scale, precision = header.get("scale", DEFAULT_SCALE), header.get("precision", arguments.precision)
        return Session(arguments, world, None, EvaluationOptions(None, precision, (scale[0], scale[1]), 0))
    checkpoint = loading.resolved(arguments.checkpoint)
    scale = arguments.scale or image_scale(checkpoint, DEFAULT_SCALE)
    options = EvaluationOptions(arguments.batch_size, arguments.precision, scale, arguments.workers)
    return Session(arguments, world, load_detector(checkpoint, world.device), options)


def answer(
    session: Session, protocol: "EvaluationProtocol[Any]", name: str, identity: dict[str, Any]
) -> "Evaluation[Any]":
    """A protocol's figures from the model, or with --score from a file of answers."""
    from tqdm import tqdm

    from groundingdino.evaluation import Evaluation, evaluate, metrics
    from groundingdino.evaluation.answer_file import AnswerStore, read_answers
    from groundingdino.inference.engine import TOP_K_PER_CAPTION
    from groundingdino.runtime import distributed

    arguments, questions = session.arguments, protocol.questions()
    prompts = sum(len(question.prompts) for question in questions)
    if arguments.score is not None:
        header, answers = read_answers(arguments.score)
        if header.get("protocol") != identity["protocol"]:
            raise ValueError(f"{arguments.score} answers {header.get('protocol')!r}, not {identity['protocol']!r}")
        return Evaluation(protocol.score(answers), len(questions), prompts, 0.0, session.options)
    identity |= {
        "checkpoint": fingerprint(loading.resolved(arguments.checkpoint)),
        "precision": session.options.precision,
    }
    identity["scale"] = list(session.options.scale)
    if session.mixture is not None:
        identity["mixture"] = session.mixture
    store = AnswerStore(arguments.folder / f"{name}.answers", identity, arguments.resume)
    total = -(-prompts // session.world.size)  # of this process, about
    with tqdm(total=total, unit=" prompts", desc=name, disable=not distributed.is_main() or None) as bar:
        return evaluate(
            session.model,
            protocol,
            session.options,
            device=session.world.device,
            boxes_per_caption=metrics.AP_DETECTIONS if arguments.name in REFERRING else TOP_K_PER_CAPTION,
            name=str(arguments.checkpoint),
            progress=lambda count: bar.update(count),
            store=store,
        )


def fingerprint(checkpoint: Path) -> str:
    """Tells two checkpoints apart: size, and checksum of the last of the weights."""
    with checkpoint.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - FINGERPRINT_BYTES))
        return f"{size} bytes, crc32 {zlib.crc32(file.read()):08x}"


def release_of(session: Session) -> str | None:
    """The released checkpoint that the one evaluated was converted from, if it is one."""
    from groundingdino.checkpoints.model_file import read_metadata, stored_source

    checkpoint = session.arguments.checkpoint
    if session.mixture is not None or not checkpoint.exists() and not loading.is_name(checkpoint):
        return None
    release = stored_source(checkpoint, read_metadata(loading.resolved(checkpoint))).get("release")
    return release if isinstance(release, str) else None


def heading(session: Session, evaluation: "Evaluation[Any]", unit: str) -> Iterator[str]:
    """What was evaluated and how fast."""
    release = release_of(session)
    name = f"{session.arguments.checkpoint}{f' = {release}' if release else ''}"
    source = name if session.model is not None else str(session.arguments.score)
    rate = f", {evaluation.prompts / evaluation.seconds:.2f} a second" if evaluation.seconds else ""
    yield f"{source}: {evaluation.prompts} {unit} about {evaluation.images} images{rate}"


def write_report(session: Session, name: str, content: dict[str, Any]) -> Path:
    """The report as JSON, with the checkpoint and device in front. Returns where it is."""
    from groundingdino.runtime.files import write_text

    arguments = session.arguments
    start = {
        "checkpoint": str(arguments.checkpoint),
        "mixture": session.mixture,
        "release": release_of(session),
        "device": str(session.world.device),
        "processes": session.world.size,
    }
    path = arguments.folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**start, **content}, indent=1) + "\n")
    return path


def print_retention(arguments: Arguments) -> None:
    """The table of `retention`. ValueError if a report is missing."""
    from groundingdino.evaluation.report import comparison, read_report

    if not arguments.before or not arguments.after:
        raise ValueError("retention compares reports: give --before REPORT.json ... and --after REPORT.json ...")
    for line in comparison(list(map(read_report, arguments.before)), list(map(read_report, arguments.after))):
        print(line)


def run(arguments: Arguments) -> int:
    """The exit code."""
    if arguments.name == "retention":
        print_retention(arguments)
        return 0
    loading.check_scale(arguments.scale)
    problem = missing_checkpoint(arguments)
    if problem is not None:
        raise ValueError(problem)
    console.require(["pycocotools"], "train")
    from groundingdino.cli import evaluate_detection, evaluate_mixtures, evaluate_referring

    kind = evaluate_referring if arguments.name in REFERRING else evaluate_detection
    kind.check(arguments)  # before torch is imported
    if arguments.alpha:
        evaluate_mixtures.check(arguments)
    from groundingdino.runtime import devices, distributed  # from here on it is slow to import: torch and all

    device = devices.pick_device(arguments.device)
    devices.tune_process(device)
    try:
        session = open_session(arguments, distributed.init(str(device)))
        lines = evaluate_mixtures.evaluate(session, kind) if arguments.alpha else kind.evaluate(session)
        for line in lines:
            if distributed.is_main():
                print(line, flush=True)
    finally:
        distributed.shutdown()
    return 0


def main(arguments: Sequence[str], prog: str = "groundingdino evaluate") -> int:
    """The exit code."""
    return console.run(prog, lambda: run(console.parse(Arguments, arguments, prog, description=__doc__)))
