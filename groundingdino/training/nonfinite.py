"""What happens when a loss or a gradient is not finite.

The step itself has changed nothing by then (`optimizer.finite_step`), on any process: the gradient norm is the same on
all of them. Here the images are named, and the run stops or goes on.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from groundingdino.runtime import distributed
from groundingdino.training.recorder import StepValues

TROUBLE = "nonfinite.jsonl"
MOST_IN_A_ROW = 100  # skipped steps after which even the policy "skip" gives up


class NonFiniteLossError(ArithmeticError):
    """Training was stopped by a loss that is not finite; weights, optimizer and checkpoints are as before that step."""


class LossGuard:
    """Looks at the steps that have been read. All processes must call it at the same steps."""

    def __init__(self, run: Path, policy: str, scaled: bool, say: Callable[[str], None]) -> None:
        """`policy` "stop" or "skip"; `scaled`: whether a loss scale is used, which overflows now and then by design."""
        self._file = run / TROUBLE
        self._policy = policy
        self._scaled = scaled
        self._say = say
        self._in_a_row = 0

    def check(self, steps: Sequence[StepValues]) -> None:
        """Names the images of bad steps in `nonfinite.jsonl`. NonFiniteLossError under the policy "stop"."""
        for step in steps:
            if math.isfinite(step.grad_norm):
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            records = [r for r in distributed.gather_objects(_describe(step)) if r is not None]
            if not records and self._scaled:
                continue  # the gradients overflowed, not the loss: the scaler has halved its scale
            records = records or [r for r in distributed.gather_objects(_describe(step, always=True)) if r is not None]
            self._report(step, records)

    def _report(self, step: StepValues, records: list[dict]) -> None:
        if distributed.is_main():
            with open(self._file, "a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
        what = "loss" if any(r["loss"] is None for r in records) else "gradient"
        named = "; ".join(f"{s['image']} ({s['caption'].strip()!r})" for r in records for s in r["samples"])
        line = f"step {step.step}: the {what} is not finite, the step was left out; images: {named}; see {self._file}"
        if self._policy == "stop":
            raise NonFiniteLossError(f"{line}. Weights and checkpoints are unharmed; go on with --on-nonfinite skip")
        if self._in_a_row >= MOST_IN_A_ROW:
            raise NonFiniteLossError(f"{line}. {MOST_IN_A_ROW} steps in a row: stopping; try a smaller learning rate")
        self._say(line)


def _describe(step: StepValues, always: bool = False) -> dict | None:
    """What to write about this process's part of a step; None where its own loss was finite."""
    if math.isfinite(step.own_loss) and not always:
        return None
    return {
        "step": step.step,
        "epoch": step.epoch,
        "rank": distributed.rank(),
        "loss": step.own_loss if math.isfinite(step.own_loss) else None,
        "gradient_norm": step.grad_norm if math.isfinite(step.grad_norm) else None,
        "terms": [name for name, value in step.terms.items() if not math.isfinite(value)],
        "samples": [
            {"image": str(s.image_path), "caption": s.caption, "data_set": s.dataset_name, "line": s.line}
            for s in step.samples
        ],
    }
