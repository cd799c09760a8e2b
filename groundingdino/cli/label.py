"""Label any number of images: names and a folder in, boxes for a smaller detector out.

    groundingdino label photos/ --names names.yaml --out labels/ --to yolo
    groundingdino label shard-000.tar shard-001.tar --names coco --out labels/ --to coco
    groundingdino label s3://bucket/photos/ --names names.yaml --out labels/ --upload s3://bucket/labels/
    groundingdino label film.mp4 --every 5 --names names.txt --out labels/ --to jsonl
    groundingdino label --out labels/ --names names.yaml --threshold 0.4 --rescore --to yolo      without the model
    groundingdino label --threshold-from gold.json --names names.yaml --out gold/      the best threshold of each name
    groundingdino label --review labels/      accept and reject in the browser

Killed at any moment, the same command goes on; run it several times at once, on any hosts that share the folder
(torchrun, srun, a Kubernetes job), and they divide the images. The folder also gets broken.jsonl, sample/, scores.svg.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from groundingdino.cli import console, loading

if TYPE_CHECKING:
    from groundingdino.cli.label_output import Labelled, Labels
    from groundingdino.inference.label_store import LabelRun
    from groundingdino.inference.labelling import Choice, Chooser, LabelOptions
    from groundingdino.inference.vocabulary import Vocabulary


OWN_FILES = frozenset({"shards", "images.jsonl", "manifest.json", "choice.json"})  # of a run, not of its labels


@dataclass(frozen=True)
class Arguments:
    """What to label, with which names, and where the labels go."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[IMAGES ...]")]
    """folders (with those inside), images, lists of paths (.txt), tar shards, annotation files (.json), videos;
    folders, images and tar shards may be URIs, such as s3://bucket/photos/"""
    names: str | None = None
    """a file of names (names.txt, names.yaml), or coco, lvis, objects365, v3det, odinw/NAME"""
    out: Path | None = None
    """folder of the run and its labels"""
    to: Literal["coco", "yolo", "voc", "odvg", "labelstudio", "jsonl"] = "coco"
    """format; a finished run can be written in others by naming them in further calls"""
    upload: str | None = None
    """copy the labels to this URI, such as s3://bucket/labels/, when they are written; --out is the run's own folder"""
    masks: str | None = None
    """add COCO masks by this SAM: a folder of transformers, or a name such as facebook/sam-vit-base"""
    checkpoint: Path | None = None
    """default: the only .safetensors in this folder, weights/ or checkpoints/"""
    threshold: float = 0.3
    """least score of names without a threshold of their own"""
    nms: float = 0.7
    """IoU over which the worse of two boxes of one name goes; 1: off"""
    nms_across: float = 1.0
    """the same between boxes of any names; 1: off"""
    min_size: float = 1.0
    """least shorter side of a box in pixels"""
    top_k: int | None = None
    """most boxes of an image"""
    rescore: bool = False
    """choose labels of a finished run again, with other names of its prompts or other thresholds, without the model"""
    keep_above: float = 0.05
    """least raw score that is stored for --rescore"""
    tiles: int | None = None
    """slice larger images into tiles of so many pixels a side"""
    overlap: float = 0.2
    """of tiles, as a part of their side"""
    merge: Literal["nms", "fusion"] = "nms"
    """of an object's boxes in several tiles: the best, or their mean weighted by score"""
    every: int = 1
    """label each such frame of a video"""
    batch_size: int | None = None
    """images of one size that run together; default 1 on a CPU, else 8"""
    workers: int = 2
    """processes that decode images"""
    device: str = "auto"
    """cpu, cuda, cuda:1, npu, ..."""
    precision: loading.Precision = "fp32"
    """of weights and arithmetic; -mixed keeps the weights in float32"""
    scale: tuple[int, int] | None = None
    """short and long side in pixels that images must fit into; default is the checkpoint's, mostly 800 1333"""
    shard_size: int = 256
    """images that one process claims at a time"""
    threshold_from: Path | None = None
    """labelled images (COCO or any known format): find each name's threshold of the highest F1 on them"""
    ray: str | None = None
    """run on Ray: the address of a cluster, auto, or local for one on this machine"""
    ray_workers: int = 2
    """models on Ray"""
    review: Path | None = None
    """serve the page on which the labels of this folder are accepted and rejected"""
    host: str = "127.0.0.1"
    """of --review: address to listen at; 0.0.0.0 lets other machines in"""
    port: int = 7861
    """of --review: port to listen at"""


@dataclass(frozen=True)
class Job:
    """The arguments, understood."""

    arguments: Arguments
    out: Path
    sources: tuple[str, ...]
    vocabulary: "Vocabulary"
    choice: "Choice"
    options: "LabelOptions"


def understood(arguments: Arguments) -> Job:
    """ValueError for what is missing or out of range."""
    if arguments.names is None or arguments.out is None:
        raise ValueError("give --names and --out")
    if re.match(r"\w{2,}:/", str(arguments.out)):
        raise ValueError(
            f"--out {arguments.out}: a run's files are appended to, so its folder must be on a local or shared file "
            "system; --upload copies the labels to a URI when they are written"
        )
    sources = arguments.images or ((str(arguments.threshold_from),) if arguments.threshold_from else ())
    if not sources and not arguments.rescore:
        raise ValueError("no image given: name folders, lists, tar shards, annotation files or videos")
    for option, value in (("--every", arguments.every), ("--shard-size", arguments.shard_size)):
        if value < 1:
            raise ValueError(f"{option} {value}: at least 1")
    if arguments.masks is not None:
        if arguments.to != "coco":
            raise ValueError(f"--to {arguments.to} has no place for masks: --masks goes with --to coco")
        console.require(("transformers", "pycocotools"), "masks")
    loading.check_scale(arguments.scale)
    from groundingdino.inference.labelling import Choice, LabelOptions
    from groundingdino.inference.tiles import Tiles
    from groundingdino.inference.vocabulary import read_vocabulary

    nms, across = (None if iou == 1 else iou for iou in (arguments.nms, arguments.nms_across))
    choice = Choice(arguments.threshold, nms, across, arguments.min_size, arguments.top_k)
    tiles = None if arguments.tiles is None else Tiles(arguments.tiles, arguments.overlap, arguments.merge)
    options = LabelOptions(arguments.batch_size, arguments.workers, tiles, arguments.keep_above)
    return Job(arguments, arguments.out, sources, read_vocabulary(arguments.names), choice, options)


def asked(job: Job, checkpoint: Path) -> dict[str, Any]:
    """What tells runs apart: all that the stored scores depend on."""
    from groundingdino.cli.evaluate import fingerprint
    from groundingdino.inference.remote import is_uri

    arguments = job.arguments
    return {
        "images": [source if is_uri(source) else str(Path(source).absolute()) for source in job.sources],
        "every": arguments.every,
        "checkpoint": fingerprint(loading.resolved(checkpoint)),
        "prompts": list(job.vocabulary.texts),
        "names per caption": job.vocabulary.names_per_caption,
        "precision": arguments.precision,
        "scale": arguments.scale and list(arguments.scale),
        "tiles": job.options.tiles and asdict(job.options.tiles),
        "least score": arguments.keep_above,
    }


def label_images(job: Job) -> "LabelRun":
    """The run with every image labelled, by this process and those that work on it at the same time."""
    from tqdm import tqdm

    from groundingdino.inference.image_source import list_images
    from groundingdino.inference.label_store import LabelRun
    from groundingdino.inference.labelling import label, texts_as_names

    arguments = job.arguments
    checkpoint = loading.find_checkpoint(arguments.checkpoint)
    run = LabelRun.create(
        job.out, asked(job, checkpoint), lambda: list_images(job.sources, arguments.every), arguments.shard_size
    )
    keep_choice(job)
    total, done = run.manifest.images, run.done_images()
    quiet = True if os.environ.get("RANK", "0") != "0" else None  # None: where stderr is no terminal
    with tqdm(total=total, initial=done, unit=" images", smoothing=0.05, disable=quiet) as bar:
        if done < total and arguments.ray is not None:
            from groundingdino.cli.label_ray import label_on_ray

            label_on_ray(job, checkpoint, run, bar.update)
        elif done < total:
            predictor = loading.load_predictor(checkpoint, arguments.device, arguments.precision, arguments.scale)
            prompt = predictor.encode_prompt(texts_as_names(job.vocabulary))
            label(predictor, run, prompt, job.options, bar.update)
        bar.n = total
    return run


def choice_record(job: Job) -> dict[str, Any]:
    """What tells choices among a run's stored scores apart."""
    import msgspec

    own = {"names": msgspec.to_builtins(job.vocabulary.names), "choice": asdict(job.choice)}
    return json.loads(json.dumps({**own, "masks": job.arguments.masks}))  # type: ignore[no-any-return]


def keep_choice(job: Job) -> None:
    """Note the names and thresholds. ValueError if others were noted before, unless they are to be replaced."""
    from groundingdino.runtime.files import write_text

    path, own = job.out / "choice.json", choice_record(job)
    if path.exists() and not job.arguments.rescore:
        before = json.loads(path.read_text(encoding="utf-8"))
        if {part: before.get(part) for part in own} != own:
            raise ValueError(f"{job.out} holds labels of other names or thresholds: --rescore, or give another --out")
    elif not path.exists():
        write_text(path, json.dumps({**own, "written": []}, ensure_ascii=False, indent=1) + "\n")


def noted(job: Job) -> list[str]:
    """The formats that were written of this choice, and where they were copied to."""
    path, own = job.out / "choice.json", choice_record(job)
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return before["written"] if {part: before.get(part) for part in own} == own else []


def note(job: Job, written: str) -> None:
    """Add one to what is `noted`; that of another choice is forgotten."""
    from groundingdino.runtime.files import write_text

    record = {**choice_record(job), "written": [*noted(job), written]}
    write_text(job.out / "choice.json", json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def labels_of(run: "LabelRun", choose: "Chooser") -> "Labels":
    """The labels of the images that could be read."""
    from groundingdino.cli.label_output import Labelled, Labels
    from groundingdino.inference.image_source import root_of

    def images(start: int = 0) -> Iterator[Labelled]:
        for ref, record in run.results(start):
            if not record.problem:
                yield Labelled(record.position, ref, record.width, record.height, choose(record))

    root = root_of(run.manifest.asked["images"])
    return Labels(choose.vocabulary.shown, root, images)


def masker(model: str, device: str) -> "Callable[[Labelled], list[dict[str, Any]]]":
    """Gives a labelled image's masks in COCO's run-length encoding."""
    from groundingdino.inference.image_source import open_ref
    from groundingdino.integrations.sam import load_segmenter, masks
    from groundingdino.runtime.devices import pick_device

    segmenter = load_segmenter(model, pick_device(device))
    return lambda image: masks(open_ref(image.ref), image.found, segmenter)


def write_results(job: Job, run: "LabelRun") -> None:
    """The labels in the format, and what goes with them; once, whoever comes first."""
    from groundingdino.cli.label_output import Summary, write_labels, written_formats
    from groundingdino.inference.label_store import once
    from groundingdino.inference.labelling import Chooser
    from groundingdino.inference.remote import upload
    from groundingdino.runtime.files import atomic_file

    choose = Chooser(run.manifest.asked["prompts"], job.vocabulary, job.choice, run.manifest.asked["least score"])
    to, uri = job.arguments.to, job.arguments.upload

    def write() -> None:
        labels = labels_of(run, choose)
        if job.arguments.masks is not None:
            labels = replace(labels, masks=masker(job.arguments.masks, job.arguments.device))
        written = write_labels(labels, to, job.out)
        broken = 0
        with atomic_file(job.out / "broken.jsonl") as file:
            for ref, record in run.results():
                if record.problem:
                    broken += 1
                    line = {"image": ref.name, "problem": console.one_line(record.problem)}
                    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        if not noted(job):
            Summary.of(labels).save(job.out)
        note(job, to)
        old = [path.name for form, path in written_formats(job.out).items() if form not in noted(job)]
        if old:
            print(f"still of earlier names or thresholds: {', '.join(old)}")
        unread = f", {broken} could not be read: {job.out / 'broken.jsonl'}" if broken else ""
        print(f"{run.manifest.images:,} images labelled: {written}{unread}")

    def copy() -> None:
        assert uri is not None
        upload(job.out, [path.name for path in sorted(job.out.iterdir()) if path.name not in OWN_FILES], uri)
        note(job, uploaded)
        print(f"copied to {uri}")

    if to in noted(job):
        print(f"nothing to do: all {run.manifest.images:,} images that the run listed are labelled")
    once(run.shards, "write", lambda: to in noted(job), write)
    uploaded = f"{to} at {uri}"
    if uri is not None:
        once(run.shards, "upload", lambda: uploaded in noted(job), copy)


def pick_thresholds(job: Job, run: "LabelRun", gold: Path) -> None:
    """Print each name's curve on labelled images, and write names.yaml with the thresholds of the highest F1."""
    import msgspec
    import torch

    from groundingdino.data.formats import registry
    from groundingdino.data.formats.files import dump_yaml
    from groundingdino.inference.label_thresholds import curves
    from groundingdino.inference.labelling import Chooser
    from groundingdino.inference.vocabulary import Vocabulary
    from groundingdino.runtime.files import write_text

    reading = registry.read(gold)
    truth: dict[str, dict[str, list[Any]]] = {}
    for entry in reading:
        boxes = truth.setdefault(os.path.realpath(reading.images / entry.file_name), {})
        for thing in entry.objects:
            boxes.setdefault(thing.name, []).append(thing.box)
    least = run.manifest.asked["least score"]
    everything = Vocabulary(tuple(msgspec.structs.replace(one, threshold=None) for one in job.vocabulary.names))
    choose = Chooser(run.manifest.asked["prompts"], everything, replace(job.choice, threshold=least), least)
    images = (
        ({name: torch.tensor(boxes) for name, boxes in own.items()}, image.found)
        for image in labels_of(run, choose).images()
        if (own := truth.get(os.path.realpath(image.ref.file))) is not None
    )
    chosen = []
    for curve, one in zip(curves(everything.shown, images), job.vocabulary.names, strict=True):
        print("\n".join(curve.lines()))
        best = curve.best()
        chosen.append(one if best is None else msgspec.structs.replace(one, threshold=best))
        told = "none, nothing is found" if best is None else f"{best:.4f} (F1 {curve.at(best)[2]:.1%})"
        print(f"  threshold of the highest F1: {told}")
    rows = [{key: value for key, value in msgspec.to_builtins(one).items() if value} for one in chosen]
    write_text(job.out / "names.yaml", dump_yaml(rows))
    print(f"names with their thresholds: {job.out / 'names.yaml'}")


def run(arguments: Arguments) -> int:
    """The exit code."""
    if arguments.review is not None:
        from groundingdino.cli.review_page import serve

        return serve(arguments.review, arguments.host, arguments.port)
    if arguments.ray is not None:
        console.require(["ray"], "ray")
    job = understood(arguments)
    from groundingdino.inference.label_store import LabelRun

    if arguments.rescore:
        labelled = LabelRun(job.out)
        if labelled.done_images() < labelled.manifest.images:
            raise ValueError(f"{job.out} is not finished: run its command again, and then --rescore")
    else:
        labelled = label_images(job)
    if arguments.threshold_from is not None:
        pick_thresholds(job, labelled, arguments.threshold_from)
    else:
        write_results(job, labelled)
    return 0


def main(arguments: Sequence[str], prog: str = "groundingdino label") -> int:
    """The exit code."""
    return console.run(prog, lambda: run(console.parse(Arguments, arguments, prog, description=__doc__)))
