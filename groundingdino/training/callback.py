"""What a training run tells a program while it goes on: progress bars, loggers, experiment trackers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from groundingdino.training.recorder import StepValues

if TYPE_CHECKING:
    from PIL.Image import Image

    from groundingdino.data import TrainLoader
    from groundingdino.training.learner import Learner


class Callback:
    """Override what you need. What is raised ends the run."""

    def on_start(self, learner: "Learner", loader: "TrainLoader", steps: int) -> None:
        """Before the first step, on every process: what is trained, and how many steps are left."""

    def on_steps(self, steps: Sequence[StepValues], images_per_second: float) -> None:
        """After every `log_every` steps, in the main process."""

    def on_evaluation(self, step: int, epoch: int, figures: Mapping[str, Mapping[str, float]]) -> None:
        """After each evaluation, in the main process: split -> figure -> value."""

    def on_picture(self, step: int, name: str, picture: "Image") -> None:
        """After each evaluation, in the main process: ground truth beside the answer, for each of `config.pictures`."""

    def on_end(self) -> None:
        """When the run ends, also by an error, on every process."""
