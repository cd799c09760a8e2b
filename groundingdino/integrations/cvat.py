"""A CVAT auto-annotation function: `spec` says the labels, `detect` annotates one image.

    cvat-cli task auto-annotate 7 --function-module groundingdino.integrations.cvat \\
        -p checkpoint=str:mm-gdino-b -p names=str:"cat, dog"
"""

from collections.abc import Sequence

from cvat_sdk import auto_annotation as cvat
from cvat_sdk import models
from PIL import Image

from groundingdino.inference.predictor import DetectionFilter, Predictor, load_model
from groundingdino.inference.prompts import Categories


class AnnotationFunction:
    """CVAT's `DetectionFunction`: rectangles with scores, for labels that are called as the names are."""

    def __init__(self, predictor: Predictor, names: Sequence[str]) -> None:
        self._predictor = predictor
        self._prompt = predictor.encode_prompt(Categories(names))
        self.spec = cvat.DetectionFunctionSpec(
            labels=[
                cvat.label_spec(name, number, type="rectangle")
                for number, name in enumerate(self._prompt.resolved.names)
            ]
        )

    def detect(self, context: cvat.DetectionFunctionContext, image: Image.Image) -> list[models.LabeledShapeRequest]:
        """The rectangles whose score is at least the context's threshold, 0.3 where it has none."""
        (found,) = self._predictor.stream([image], self._prompt, DetectionFilter(context.conf_threshold))
        return [
            cvat.rectangle(label, box, score=score)
            for label, box, score in zip(
                found.labels.tolist(), found.boxes.tolist(), found.scores.tolist(), strict=True
            )
        ]


def create(checkpoint: str, names: str, device: str = "auto") -> AnnotationFunction:
    """What CVAT's command line calls with its `-p` parameters; names are separated by commas."""
    return AnnotationFunction(load_model(checkpoint, device), [name.strip() for name in names.split(",")])
