"""Train MM-Grounding-DINO.

    groundingdino train finetune --data DIR --init mm-gdino-t    a released model learns your own data; see its --help
    groundingdino train quickstart                               a small model learns rendered scenes, on a CPU
    groundingdino train --data.root DIR                          the RefCOCO recipe on one device
    torchrun --nproc_per_node=8 train.py --data.root DIR         on 8 devices; without train.py: -m groundingdino train
    torchrun --nproc_per_node=8 --max-restarts 3 train.py --resume auto      goes on after a crash
    torchrun --nproc_per_node=8 -- train.py --run-dir DIR        `--`, where torchrun would take a flag for its own

Exit code 2: something that you can fix, in one line. 1: training was stopped by a loss that is not finite.
75: stopped by SIGINT, SIGTERM, SIGUSR1, SIGHUP or --max-time with its state saved; --resume auto goes on bit-equal.
A second signal ends it at once.
"""

import contextlib
import difflib
import io
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from groundingdino.cli import console
from groundingdino.config import TrainConfig
from groundingdino.training.recipes import TRAIN_PRESETS

if TYPE_CHECKING:
    from groundingdino.runtime.distributed import World
    from groundingdino.training.stop import StopRequest
    from groundingdino.training.trainer import FitResult

    Job = Callable[[World, StopRequest], FitResult]

DEFAULT = "refcoco"
STOPPED = 75  # exit code of a run that a signal or --max-time has ended early: start it again with --resume auto
FIRST_FLAGS = (  # what people set first; the short help shows these
    "--data.root",
    "--data.train-files",
    "--data.image-dirs",
    "--data.evaluation",
    "--data.batch-size",
    "--data.workers",
    "--data.on-bad-sample",
    "--run-dir",
    "--init-from",
    "--resume",
    "--epochs",
    "--optimizer.lr",
    "--schedule.milestones",
    "--precision",
    "--device",
    "--accumulation-steps",
    "--activation-checkpointing",
    "--ema-decay",
    "--freeze",
    "--seed",
)
HELP = {
    "refcoco": "fine-tune MM-GDINO-B on RefCOCO",
    "refcoco+": "fine-tune MM-GDINO-B on RefCOCO+",
    "refcocog": "fine-tune MM-GDINO-B on RefCOCOg",
    "grefcoco": "fine-tune MM-GDINO-B on gRefCOCO",
    "coco": "fine-tune MM-GDINO-T on COCO",
    "lvis": "fine-tune MM-GDINO-T on LVIS",
    "pretrain": "MM-GDINO-T on Objects365, GoldG and V3Det",
    "quickstart": "a small model on rendered scenes, 2 CPU cores",
}

# Flags of version 0.1, understood for one more version.
RENAMED = {
    "--run": "--run-dir",
    "--init": "--init-from",
    "--accumulate": "--accumulation-steps",
    "--data.train": "--data.train-files",
    "--data.images": "--data.image-dirs",
    "--data.weights": "--data.sampling-weights",
    "--data.evaluation-images": "--data.evaluation-image-dirs",
    "--data.evaluation-image-dir": "--data.evaluation-image-dirs",
}


def current_flags(arguments: Sequence[str], prog: str) -> list[str]:
    """The arguments with today's name for every flag that has been renamed; a line on stderr says so."""
    current = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        new = RENAMED.get(name.replace("_", "-"))
        argument = re.sub("^--model[.]text[-_]from", "--text-from", argument)  # beside the sizes that it decides
        if new is not None:
            console.complain(prog, f"warning: {name} is called {new} now; the old name goes with the next version")
        current.append(argument if new is None else f"{new}{equals}{value}")
    return current


def parse(arguments: Sequence[str], prog: str = "groundingdino train") -> tuple[str, TrainConfig]:
    """The preset's name and the config with what the command line changes of it.

    Prints the help and raises SystemExit(0) where it is asked for. Raises UsageError in one line.
    """
    arguments = current_flags(arguments, prog)
    preset, rest = (arguments[0], arguments[1:]) if arguments and arguments[0][:1] != "-" else (DEFAULT, arguments)
    if preset not in TRAIN_PRESETS:
        near = difflib.get_close_matches(preset, [*TRAIN_PRESETS, "finetune"], n=1) or [", ".join(TRAIN_PRESETS)]
        raise console.UsageError(f"no preset {preset!r} (perhaps {near[0]}?); see {prog} --help")
    if "--help" in rest or "-h" in rest:
        print(short_help(preset, prog))
        raise SystemExit(0)
    rest = ["--help" if argument == "--help-all" else argument for argument in rest]
    return preset, _config(preset, rest, prog)


def _config(preset: str, arguments: Sequence[str], prog: str) -> TrainConfig:
    name = f"{prog} {preset}"
    return console.parse(TrainConfig, arguments, name, default=TRAIN_PRESETS[preset](), description=HELP[preset])


def short_help(preset: str, prog: str) -> str:
    """The presets and the flags that people set first, with the defaults of this preset."""
    entries = _flag_entries(preset, prog)
    lines = [
        f"usage: {prog} [finetune|{'|'.join(TRAIN_PRESETS)}] [FLAG ...]",
        "",
        (__doc__ or "").strip(),
        "",
        "Presets:",
    ]
    lines += ["  finetune    a released or a fresh model on data of your own, of any format"]
    lines += [f"  {name:12}{summary}{' (default)' if name == DEFAULT else ''}" for name, summary in HELP.items()]
    lines += ["", f"The flags that people set first, with the defaults of {preset}:"]
    for flag in FIRST_FLAGS:
        lines += [f"  {entries[flag][0]}", *(f"      {line}" for line in entries[flag][1:])]
    return "\n".join([*lines, "", f"All flags ({len(entries)}): {prog} {preset} --help-all"])


def _flag_entries(preset: str, prog: str) -> dict[str, list[str]]:
    """Each flag's lines in the whole help: its form, then what it means."""
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        _config(preset, ["--help"], prog)
    entries: dict[str, list[str]] = {}
    flag = ""
    for line in console.unboxed(page.getvalue()):
        if line.startswith("--"):
            flag = re.split(r"[ ,]", line)[0]
            entries[flag] = [line]
        elif flag and line:
            entries[flag].append(line)
        else:
            flag = ""
    return entries


def resume_hint(run_dir: Path) -> str:
    """What to say about going on, where there is something to go on from."""
    return "; go on with --resume auto" if (run_dir / "last.state").is_file() else ""


def train(config: TrainConfig, prog: str, job: "Job") -> int:
    """Run a job with this config's device and timeout; say where everything is. The exit code."""
    console.require(console.TRAIN_PACKAGES, "train")
    from groundingdino.runtime import devices, distributed  # from here on it is slow to import: torch and all
    from groundingdino.training.nonfinite import NonFiniteLossError
    from groundingdino.training.stop import RunStopped, StopRequest, stop_on_signals

    device = devices.pick_device(config.device)
    devices.tune_process(device)
    note = devices.make_deterministic(device) if config.deterministic else None
    request = StopRequest(config.max_time)
    try:
        world = distributed.init(str(device), timeout_minutes=config.timeout)
        console.show_log(prog, progress=distributed.is_main())
        if note is not None and distributed.is_main():
            logging.getLogger("groundingdino").info(note)
        with stop_on_signals(request):
            result = job(world, request)
        for what, path in result.files.items():
            logging.getLogger("groundingdino").info(f"{what}: {path}")
    except NonFiniteLossError as error:
        console.complain_once(prog, error)
        return 1
    except RunStopped as end:
        if distributed.is_main():
            console.complain(prog, f"{end}{resume_hint(config.run_dir)}")
        distributed.shutdown()
        return STOPPED
    except KeyboardInterrupt:
        console.complain(prog, f"interrupted{resume_hint(config.run_dir)}")
        return console.INTERRUPTED
    distributed.shutdown()
    return 0


def job_of(preset: str, config: TrainConfig) -> "Job":
    """What trains a preset's config."""

    def job(world: "World", stop: "StopRequest") -> "FitResult":
        from groundingdino.training import quickstart
        from groundingdino.training.setup import missing_data
        from groundingdino.training.trainer import fit

        if preset == "quickstart":
            quickstart.make_data(config)
        problem = missing_data(config.data)
        if problem is not None:
            raise ValueError(problem)
        result = fit(config, world, stop)
        if preset == "quickstart":
            quickstart.report(config, world, result)
        return result

    return job


def main(arguments: Sequence[str], prog: str = "groundingdino train") -> int:
    """Parse, check, train, and say where everything is. The exit code."""
    if arguments[:1] == ["finetune"]:
        from groundingdino.cli import finetune

        return finetune.main(arguments[1:], f"{prog} finetune")

    def command() -> int:
        preset, config = parse(arguments, prog)
        return train(config, prog, job_of(preset, config))

    return console.run(prog, command)
