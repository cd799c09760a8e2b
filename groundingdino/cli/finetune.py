"""Train on data of your own: `groundingdino train finetune`.

    groundingdino train finetune --data DIR --init mm-gdino-t              a released model; the recipe fits the data
    groundingdino train finetune --data DIR --init model.safetensors --epochs 20 --data.batch-size 8
    groundingdino train finetune --data DIR --fresh small                  a small model from nothing, on a CPU
    torchrun --nproc_per_node=8 train.py finetune --data DIR --init mm-gdino-b

DIR is a folder or file of any format that `groundingdino data check` reads: COCO, YOLO, Pascal VOC and others, with
train, valid and test found by their usual names, or split off. After each epoch AP is measured on the validation
split; best.safetensors is the best by AP, and is measured on the test split at the end.
Every flag of `groundingdino train refcoco --help-all` changes the recipe: --data.batch-size, --optimizer.lr, ...
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from groundingdino.cli import console, loading, train
from groundingdino.config import MODEL_PRESETS, ModelConfig, TrainConfig, small_model
from groundingdino.training.recipes import DataSize, finetune, from_scratch

if TYPE_CHECKING:
    from groundingdino.runtime.distributed import World
    from groundingdino.training.finetune import Task
    from groundingdino.training.stop import StopRequest
    from groundingdino.training.trainer import FitResult

FRESH = {"small": small_model, **MODEL_PRESETS}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to train on what."""

    data: Path
    """folder or file of any format"""
    init: Annotated[Path | None, tyro.conf.arg(aliases=["--init-from"])] = None
    """weights to start from: a file, or the name of a release (`groundingdino models`); default: the only checkpoint
    in this folder, weights/ or checkpoints/"""
    fresh: Literal["small", "swin_t", "swin_b", "swin_l"] | None = None
    """start from fresh weights of this size instead"""
    text_from: Annotated[Path | None, tyro.conf.arg(aliases=["--model.text-from"])] = None
    """with --fresh: folder of a trained BERT (transformers' layout) for the text encoder, which is frozen then"""
    retain: Path | None = None
    """annotations of other data, of any format and with their own names: evaluated before and after, to see what is
    forgotten"""
    replay: Annotated[str | None, tyro.conf.arg(metavar="FILE:SHARE")] = None
    """mix other training data in, against forgetting: FILE:0.2 makes them a fifth of each epoch"""
    names: Path | None = None
    """names.yaml that says what to call the categories, such as `RBC: red blood cell`"""
    epochs: int | None = None
    """passes over the training data; default: as suits its size"""
    steps: int | None = None
    """optimizer steps, in whole epochs, instead"""
    run_dir: Path = Path("runs/finetune")
    """folder of checkpoints, metrics and pictures"""
    images: Path | None = None
    """the folder of the images; default: looked for near the annotations"""
    label_map: Path | None = None
    """names of ODVG detection data; default: the one beside the file"""
    allow_outside: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """accept file names that are absolute or leave the image folder by ".." """

    def start(self) -> Path | ModelConfig:
        """Weights, or sizes for fresh ones. ValueError where there are none, or both are given."""
        if self.fresh is None:
            if self.text_from is not None:
                raise ValueError("--text-from is for fresh weights, see --fresh; other weights bring their own BERT")
            return loading.find_checkpoint(self.init)
        if self.init is not None:
            raise ValueError("--init and --fresh: weights to start from, or fresh ones, not both")
        return FRESH[self.fresh]()


def task_of(arguments: Arguments, resume: str | None) -> "Task":
    """The arguments as the library takes them."""
    from groundingdino.data.formats.record import ReadOptions
    from groundingdino.inference.vocabulary import read_vocabulary, split_context
    from groundingdino.training.finetune import Task

    names = None
    if arguments.names is not None:
        vocabulary = read_vocabulary(arguments.names)
        names = {one.name: split_context(one.texts[0])[1] for one in vocabulary.names}
    reading = ReadOptions(arguments.images, arguments.label_map, None, arguments.allow_outside)
    return Task(
        arguments.data,
        arguments.start(),
        arguments.run_dir,
        arguments.epochs,
        arguments.steps,
        arguments.text_from,
        names,
        reading,
        resume,
        arguments.retain,
        arguments.replay,
    )


def with_flags(config: TrainConfig, flags: Sequence[str], prog: str) -> TrainConfig:
    """The config with what the command line changes of it. Raises UsageError."""
    return console.parse(TrainConfig, flags, prog, default=config)


def run(arguments: Sequence[str], prog: str) -> int:
    """Parse, prepare, train and test. The exit code."""
    parsed: Any = console.parse(Arguments, arguments, prog, description=__doc__, return_unknown_args=True)
    asked: Arguments = parsed[0]
    flags: list[str] = parsed[1]
    start = asked.start()
    size = DataSize(1, 1)
    draft = from_scratch(size, start) if isinstance(start, ModelConfig) else finetune(size)
    draft = replace(with_flags(draft, flags, prog), run_dir=asked.run_dir)  # answers wrong flags before data are read

    def job(world: "World", stop: "StopRequest") -> "FitResult":
        from groundingdino.training import finetune

        prepared, config = finetune.plan(task_of(asked, draft.resume))
        return finetune.run(with_flags(config, flags, prog), prepared, world, stop)[0]

    return train.train(draft, prog, job)


def main(arguments: Sequence[str], prog: str = "groundingdino train finetune") -> int:
    """The exit code."""
    return console.run(prog, lambda: run(arguments, prog))
