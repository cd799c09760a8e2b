"""The console script: its commands, their help, and how fast a mistake is answered."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import groundingdino
from groundingdino.cli import console
from groundingdino.cli import main as command_line

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(command_line.COMMANDS)
QUICK = """
import json, sys
from groundingdino.cli.main import main
answers = []
for arguments in json.loads(sys.argv[1]):
    try:
        answers.append(main(arguments))
    except SystemExit as end:
        answers.append(end.code)
print(json.dumps([answers, "torch" in sys.modules]), file=sys.stderr)
"""


def in_a_process(*commands: list[str]) -> tuple[list[int], bool, str]:
    """Exit codes of the commands, whether torch was imported for them, and what they printed."""
    run = [sys.executable, "-c", QUICK, json.dumps(commands)]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    codes, with_torch = json.loads(done.stderr.splitlines()[-1])
    return codes, with_torch, done.stdout + done.stderr


def test_help_lists_every_command_with_a_line(capsys):
    assert command_line.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, summary in command_line.COMMANDS.items():
        assert any(line.split()[:1] == [name] and line.endswith(summary) for line in lines)


def test_version(capsys):
    assert command_line.main(["--version"]) == 0
    assert capsys.readouterr().out == f"groundingdino {groundingdino.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a command"),
        (["predcit"], "no command 'predcit' (perhaps predict?); see groundingdino --help"),
        (["predict", "--scal", "8", "8"], "Unrecognized options: --scal"),
        (["predict", "x.png", "--scale", "8"], "--scale"),
        (["predict", "x.png", "--precision", "fp8"], "--precision"),
        (["info"], "CHECKPOINT"),
        (["evaluate", "--dataset", "coco"], "--dataset"),
        (["evaluate", "--batch-size", "two"], "--batch-size"),
        (["selfcheck", "--repeats", "x"], "--repeats"),
        (["demo", "--port", "x"], "--port"),
        (["convert", "a"], "OUT"),
        (["data", "convert"], "OUT"),
        (["train", "refcocoo"], "no preset 'refcocoo' (perhaps refcoco?)"),
        (["train", "--optimizer.lrr", "1"], "--optimizer.lrr, 1 (perhaps --optimizer.lr?)"),
        (["train", "--epochs", "many"], "--epochs"),
        (["train", "--precision", "fp8"], "--precision"),
        (["train", "--epochs"], "--epochs"),
    ],
)
def test_a_usage_error_is_one_line_with_a_pointer_to_the_help(capsys, arguments, message):
    assert command_line.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("groundingdino") and message in captured.err
    assert captured.err.rstrip().endswith("--help") and "│" not in captured.err


def test_help_and_usage_errors_are_answered_without_torch():
    helps = [[name, "--help"] for name in COMMANDS if name != "data"] + [["data", "convert", "--help"], ["--help"]]
    codes, with_torch, output = in_a_process(*helps, ["train", "refcoco", "--help-all"])
    assert codes == [0] * (len(helps) + 1) and not with_torch, output
    mistakes = [[name, "--no-such-option", "1"] for name in COMMANDS] + [[], ["x"], ["train", "x"], ["info", "gone"]]
    mistakes += [["predict", "x.png"], ["predict", "x.png", "--refer", "a", "--phrases", "b"], ["evaluate"]]
    codes, with_torch, output = in_a_process(*mistakes)
    assert codes == [2] * len(mistakes) and not with_torch, output


@pytest.mark.parametrize("arguments", [["--help"], ["train", "refcoco", "--help"], ["predict", "--scal", "1"]])
def test_an_answer_takes_less_than_a_second_of_the_processor(arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "groundingdino", *arguments], cwd=ROOT, capture_output=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize("door", ["train.py", "evaluate.py", "convert_checkpoint.py"])
def test_a_door_is_short_and_names_itself(door):
    assert len((ROOT / door).read_text().splitlines()) <= 15
    done = subprocess.run([sys.executable, ROOT / door, "--no-such"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith(f"{door}: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            lambda torch: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU\n..."),
            "20.00 GiB",
        ),
        (
            lambda torch: RuntimeError("NPU out of memory. Tried to allocate 1.50 MiB (NPU 0..."),
            "the device is used up",
        ),
        (lambda torch: torch.empty(2**55), "this machine is used up, .* GiB were asked for: try a smaller batch"),
        (lambda torch: bytearray(2**62), "this machine is used up: try a smaller batch"),
    ],
)
def test_memory_that_is_used_up_is_one_line(capsys, error, message):
    import torch

    def command() -> int:
        raise error(torch)

    assert console.run("prog", command) == console.USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"prog: the memory of .*{message}", line)


def test_other_errors_are_not_taken_for_the_end_of_memory():
    def command() -> int:
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        console.run("prog", command)


def test_a_mistake_under_torchrun_is_the_cause_that_its_report_names(tmp_path, monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert command_line.main(["label", "photos"]) == 2
    failure = ProcessFailure(0, 1, 2, str(tmp_path / "error.json"))
    assert failure.message == "groundingdino label: give --names and --out"
