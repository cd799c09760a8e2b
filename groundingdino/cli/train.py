"""Train MM-Grounding-DINO.

    torchrun --nproc_per_node=8 train.py                    the RefCOCO recipe: MM-GDINO-B, 8 devices with 2 images each
    python train.py quickstart                              a small model learns rendered scenes on a CPU, from nothing
    python train.py --data.root DIR --optimizer.lr 1e-4     any field of any preset can be set; see train.py refcoco -h
    torchrun --nproc_per_node=8 --max-restarts 3 train.py --resume auto      goes on after a crash
    torchrun --nproc_per_node=8 -- train.py --run-dir DIR   `--`, where torchrun would take a flag for its own

Exit code 2: something that you can fix, in one line. 1: training was stopped by a loss that is not finite.
"""

import logging
import os
import sys
import time

import tyro

from groundingdino.config import TRAIN_PRESETS, TrainConfig

DEFAULT = "refcoco"
OTHERS_WAIT = 3.0  # seconds
HELP = {"refcoco": "fine-tune MM-GDINO-B on RefCOCO", "quickstart": "a small model on rendered scenes, 2 CPU cores"}

# Flags of version 0.1, understood for one more version.
RENAMED = {
    "--run": "--run-dir",
    "--init": "--init-from",
    "--accumulate": "--accumulation-steps",
    "--data.train": "--data.train-files",
    "--data.images": "--data.image-dirs",
    "--data.weights": "--data.sampling-weights",
    "--data.evaluation-images": "--data.evaluation-image-dir",
}


def current_flags(arguments: list[str]) -> list[str]:
    """The arguments with today's name for every flag that has been renamed."""
    names = [argument.replace("_", "-").partition("=") for argument in arguments]
    return [
        RENAMED[name] + equals + argument[len(name) + len(equals) :] if name in RENAMED else argument
        for argument, (name, equals, _) in zip(arguments, names, strict=True)
    ]


def parse(arguments: list[str]) -> tuple[str, TrainConfig]:
    """The preset's name and the config with what the command line changes of it."""
    arguments = current_flags(arguments)
    if not arguments or arguments[0] not in (*TRAIN_PRESETS, "-h", "--help"):
        arguments = [DEFAULT, *arguments]
    presets = {name: (HELP[name], preset()) for name, preset in TRAIN_PRESETS.items()}
    config = tyro.extras.overridable_config_cli(presets, args=arguments, prog="train.py", description=__doc__)
    return arguments[0], config


def complain(error: Exception) -> None:
    """One line on stderr, from one process where all of them fail alike."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(OTHERS_WAIT)  # torchrun ends this process meanwhile if the main one has failed too
    where = "" if rank == "0" else f"process {rank}: "
    print(f"train.py: {where}{' '.join(str(error).split())}", file=sys.stderr, flush=True)


class ProgressHandler(logging.Handler):
    """Prints log lines on stdout, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stdout)


def show_log() -> None:
    """Print the library's log: everything of the main process, warnings of the others."""
    from groundingdino.runtime import distributed

    logger = logging.getLogger("groundingdino")
    logger.handlers = [ProgressHandler()]
    logger.setLevel(logging.INFO if distributed.is_main() else logging.WARNING)
    logger.propagate = False


def main() -> int:
    """Parse, check, train, and say where everything is. The exit code."""
    preset, config = parse(sys.argv[1:])

    from groundingdino.runtime import distributed
    from groundingdino.training import quickstart
    from groundingdino.training.nonfinite import NonFiniteLossError
    from groundingdino.training.setup import missing_data
    from groundingdino.training.trainer import fit

    try:
        world = distributed.init(config.device)
        show_log()
        if preset == "quickstart":
            quickstart.make_data(config)
        problem = missing_data(config.data)
        if problem is not None:
            raise ValueError(problem)
        result = fit(config, world)
        for what, path in result.files.items():
            logging.getLogger("groundingdino").info(f"{what}: {path}")
        if preset == "quickstart":
            quickstart.report(config, world, result)
    except (ValueError, OSError, NonFiniteLossError) as error:
        complain(error)
        return 1 if isinstance(error, NonFiniteLossError) else 2
    except KeyboardInterrupt:
        print("train.py: interrupted; go on with --resume auto", file=sys.stderr)
        return 130
    distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
