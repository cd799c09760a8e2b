"""A SAHI detection model, whose predictions carry class indices.

model = SahiDetector(gd.load_model("mm-gdino-b"), ["car", "bus"])
sahi.predict.get_sliced_prediction("street.jpg", model, slice_height=640, slice_width=640)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sahi.models.base import DetectionModel
from sahi.prediction import ObjectPrediction
from sahi.utils.compatibility import fix_full_shape_list, fix_shift_amount_list

from groundingdino.inference.predictor import DetectionFilter, Predictor
from groundingdino.inference.prompts import Categories


class SahiDetector(DetectionModel):  # type: ignore[misc]
    """A class index is the name's place in the list; `options` are SAHI's, such as `confidence_threshold` (0.3)."""

    def __init__(self, predictor: Predictor, names: Sequence[str], **options: Any) -> None:
        self._prompt = predictor.encode_prompt(Categories(names))
        mapping = {str(number): name for number, name in enumerate(self._prompt.resolved.names)}
        super().__init__(model=predictor, category_mapping=mapping, **options)

    def set_device(self, device: str | None = None) -> None:
        """Keeps the predictor where it is; SAHI calls this before it has a model."""
        self.device = device

    def set_model(self, model: Predictor, **_: Any) -> None:
        """Take over the predictor."""
        self.model = model

    def perform_inference(self, image: np.ndarray) -> None:
        """Keep the detections of one (H, W, 3) RGB image."""
        self.perform_batch_inference([image])

    def perform_batch_inference(self, images: list[np.ndarray]) -> None:
        """Keep the detections of several, which run together."""
        keep = DetectionFilter(threshold=self.confidence_threshold)
        self._original_predictions = list(self.model.stream(images, self._prompt, keep, batch_size=len(images)))

    def _create_object_prediction_list_from_original_predictions(
        self, shift_amount_list: Any = None, full_shape_list: Any = None
    ) -> None:
        all_found = self._original_predictions
        shifts = fix_shift_amount_list(shift_amount_list or [0, 0])
        shapes = fix_full_shape_list(full_shape_list) or [None] * len(all_found)
        self._object_prediction_list_per_image = [
            [
                ObjectPrediction(
                    box, label, self.category_mapping[str(label)], score=score, shift_amount=shift, full_shape=shape
                )
                for box, label, score in zip(
                    found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True
                )
            ]
            for found, shift, shape in zip(all_found, shifts, shapes, strict=True)
        ]
