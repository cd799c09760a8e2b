"""What happens when a loss or a gradient is not finite.

The step itself has changed nothing by then (`optimizer.finite_step`), on any process: the gradient norm is the same on
all of them. Here the images are named, and the run stops or goes on.
"""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from groundingdino.runtime import distributed
from groundingdino.training.recorder import StepValues

MAX_IN_A_ROW = 100  # skipped steps after which even the policy "skip" gives up

logger = logging.getLogger(__name__)


class NonFiniteLossError(ArithmeticError):
    """Training was stopped by a loss that is not finite; weights, optimizer and checkpoints are as before that step."""


class LossGuard:
    """Checks the steps whose values have reached the host. All processes must call it at the same steps."""

    def __init__(self, file: Path, policy: str, scaled: bool, max_in_a_row: int = MAX_IN_A_ROW) -> None:
        """Args:
        file: takes one JSON line per process and bad step.
        policy: "stop" or "skip".
        scaled: whether a loss scale is used, which overflows now and then by design.
        max_in_a_row: skipped steps after which "skip" gives up.
        """
        self._file = file
        self._policy = policy
        self._scaled = scaled
        self._max_in_a_row = max_in_a_row
        self._in_a_row = 0

    def check(self, steps: Sequence[StepValues]) -> None:
        """Record the images of bad steps. NonFiniteLossError under the policy "stop", or after too many in a row."""
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
        if self._in_a_row >= self._max_in_a_row:
            raise NonFiniteLossError(f"{line}. {self._in_a_row} steps in a row: stopping; try a smaller learning rate")
        if distributed.is_main():
            logger.warning(line)


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
