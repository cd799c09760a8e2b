"""What every command shares: arguments are parsed, problems end in one line, warnings are one line each.

Imports nothing heavy, so that a wrong argument is answered at once.
"""

import contextlib
import difflib
import importlib.util
import io
import itertools
import json
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

import tyro

from groundingdino.runtime import bootstrap
from groundingdino.runtime.messages import printable

T = TypeVar("T")

TRAIN_PACKAGES = ("scipy", "pycocotools", "tensorboard", "matplotlib")  # of the extra `train`
USER_ERROR = 2  # exit code: something that the user can fix
INTERRUPTED = 130  # exit code, as shells have it for SIGINT
OTHERS_WAIT = 8.0  # seconds that the other processes of a run leave the main one to report the same problem first
ANSI_CODE = re.compile(r"\x1b\[[0-9;]*m")
BORDER = re.compile(r"[╭╰+]|[│| ]*[─-]{4,}[│| ]*$")


class UsageError(ValueError):
    """Arguments that cannot be understood, in one line."""


def one_line(text: object) -> str:
    """The printable text with its white space joined."""
    return printable(" ".join(str(text).split()))


def complain(prog: str, problem: object) -> None:
    """Print the problem to stderr in one line."""
    print(f"{prog}: {one_line(problem)}", file=sys.stderr, flush=True)


def answer_without_command(prog: str, name: str, commands: Mapping[str, str], purpose: str) -> int:
    """Help where it is asked for or no command is named, one line for a command that does not exist. The exit code."""
    if name not in ("", "-h", "--help"):
        near = difflib.get_close_matches(name, commands, n=1)
        complain(prog, f"no command {name!r}{f' (perhaps {near[0]}?)' if near else ''}; see {prog} --help")
        return USER_ERROR
    if name == "":
        complain(prog, f"name a command ({', '.join(commands)}); see {prog} --help")
        return USER_ERROR
    width = max(map(len, commands)) + 2
    rows = [f"  {command:{width}}{summary}" for command, summary in commands.items()]
    usage = f"usage: {prog} COMMAND [OPTION ...]\n       {prog} COMMAND --help"
    print("\n".join([usage, "", purpose, "", *rows]))
    return 0


def parse(form: Callable[..., T], arguments: Sequence[str], prog: str, **options: Any) -> T:
    """What `tyro.cli` makes of the arguments.

    Prints the help and raises SystemExit(0) where it is asked for. Raises UsageError, with a pointer to the help, where
    tyro would print a box.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(form, args=list(arguments), prog=prog, **options)
    except SystemExit as end:
        if end.code == 0:
            raise
        raise UsageError(f"{_box_as_line(box.getvalue())}; see {prog} --help") from None


def unboxed(boxes: str) -> list[str]:
    """The lines in tyro's boxes; empty ones for the borders and the rules between paragraphs."""
    lines = [line.strip() for line in ANSI_CODE.sub("", boxes).splitlines()]
    return ["" if BORDER.match(line) else line.strip("│| ") for line in lines]


def _box_as_line(box: str) -> str:
    """The first paragraph of tyro's box, and the option that was perhaps meant."""
    lines = unboxed(box)
    paragraphs = [" ".join(group) for filled, group in itertools.groupby(lines[1:], bool) if filled]  # after the title
    message = paragraphs[0] if paragraphs else "the arguments cannot be understood"
    message = re.sub(r"no type matching (.+) could be instantiated from \[(.*)\]", r"expected \1, got \2", message)
    message = message.removeprefix("Error parsing ").removesuffix(".")
    if "Perhaps you meant:" in lines:
        options = [line for line in lines[lines.index("Perhaps you meant:") :] if line.startswith("--")]
        message += f" (perhaps {re.split('[ ,]', options[0])[0]}?)" if options else ""
    return message


def require(packages: Iterable[str], extra: str) -> None:
    """ValueError that says what to install where a package of an extra is missing. Imports none."""
    missing = [package for package in packages if not _is_installed(package)]
    if missing:
        raise ValueError(f'{", ".join(missing)} not installed: pip install "groundingdino[{extra}]"')


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # it is blocked, as `sys.modules[package] = None` does
        return False


def run(prog: str, command: Callable[[], int]) -> int:
    """The exit code of `command`; whatever the user can fix, and an interruption, ends in one line."""
    show_log(prog)
    bootstrap.wait_briefly()
    try:
        return command()
    except BrokenPipeError:  # whoever reads our output has seen enough, e.g. `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f": {error.filename}" if error.filename is not None else ""
        complain_once(prog, f"{error.strerror}{where}" if error.strerror else error)
        return USER_ERROR
    except ValueError as error:
        complain_once(prog, error)
        return USER_ERROR
    except KeyboardInterrupt:
        complain_once(prog, "interrupted")
        return INTERRUPTED
    except (RuntimeError, MemoryError) as error:
        from groundingdino.runtime.devices import memory_problem  # torch
        from groundingdino.runtime.loader_process import loader_problem

        problem = memory_problem(error) or loader_problem(error)
        if problem is None:
            raise
        complain_once(prog, problem)
        return USER_ERROR


def complain_once(prog: str, problem: object) -> None:
    """`complain`, but once where all processes of a run fail alike: the others give the main one time to end them."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(OTHERS_WAIT)  # torchrun ends this process meanwhile if the main one has failed too
        prog = f"{prog}: process {rank}"
    complain(prog, problem)
    if launcher := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun's own report ends with what is said there
        told = {"message": f"{prog}: {one_line(problem)}", "timestamp": int(time.time())}
        Path(launcher).write_text(json.dumps(told), encoding="utf-8")


def show_log(prog: str, progress: bool = False) -> None:
    """Print the library's log, above a progress bar where there is one.

    Warnings, those of Python's `warnings` too, go to stderr in one line each, `prog: warning: what`; with `progress`
    the rest goes to stdout as it is.
    """
    logger = logging.getLogger("groundingdino")
    logger.handlers = [_Printer(prog)]
    logger.setLevel(logging.INFO if progress else logging.WARNING)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print_above_bar(f"{prog}: warning: {one_line(message)}", sys.stderr)

    def thread_ended(problem: threading.ExceptHookArgs) -> None:
        print_above_bar(f"{prog}: warning: {one_line(problem.exc_value)}", sys.stderr)

    warnings.showwarning = show
    threading.excepthook = thread_ended  # TensorBoard's: the main thread gets the error, too


class _Printer(logging.Handler):
    def __init__(self, prog: str) -> None:
        super().__init__()
        self._prog = prog

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            print_above_bar(printable(record.getMessage()), sys.stdout)
        else:
            line = f"{self._prog}: {record.levelname.lower()}: {one_line(record.getMessage())}"
            print_above_bar(line, sys.stderr)


def print_above_bar(line: str, stream: TextIO) -> None:
    """Print without tearing a progress bar."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(line, file=stream)
        stream.flush()
    else:
        print(line, file=stream, flush=True)
