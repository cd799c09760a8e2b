"""Check the operators on this machine; the first thing to run on a new card, and what to send with a report.

    groundingdino selfcheck --device npu
    groundingdino selfcheck --device npu --tune    measures which formulation is the fastest, and uses it from now on

Prints versions, the path that deformable attention takes and why, its accuracy against the composite in float64 on the
CPU, and its time per call. Exit code 1: a result is wrong. 2: something that you can fix, in one line.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from groundingdino.cli import console


@dataclass(frozen=True)
class Arguments:
    """Where to check."""

    device: str = "auto"
    """auto, cpu, cuda, npu, ..."""
    repeats: int = 5
    """timed calls; 0 leaves the timing out"""
    tune: bool = False
    """time every formulation of deformable and window attention at the recipe's sizes; keep the table in the cache"""


def check(arguments: Arguments) -> int:
    """The exit code."""
    from groundingdino.cli.operator_report import print_report, ready_device

    device = ready_device(arguments.device)
    if arguments.tune:
        from groundingdino.cli.tuning_report import print_tuning

        print_tuning(device, arguments.repeats)
    return print_report(device, arguments.repeats)


def main(arguments: Sequence[str], prog: str = "groundingdino selfcheck") -> int:
    """The exit code."""
    return console.run(prog, lambda: check(console.parse(Arguments, arguments, prog, description=__doc__)))
