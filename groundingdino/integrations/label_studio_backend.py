"""A Label Studio ML backend that keeps each project's prompt and maps what it finds to the project's labels.

    # model.py, beside the `_wsgi.py` that `label-studio-ml create` writes
    GroundingDINO = backend(gd.load_model("mm-gdino-b"))

`<TextArea name="prompt" toName="image"/>` asks for names, separated by commas; before anything was typed the labels
themselves are looked for. `<Label value="Car" predicted_values="car, truck"/>` takes several names.
"""

from typing import Any

from label_studio_ml.model import LabelStudioMLBase
from label_studio_ml.response import ModelResponse

from groundingdino.inference.predictor import DetectionFilter, Predictor
from groundingdino.inference.prompts import Categories
from groundingdino.inputs.images import open_image
from groundingdino.integrations.label_studio import to_label_studio

PROMPT = "prompt"  # key of the project's last prompt


def backend(predictor: Predictor, threshold: float = 0.3) -> type[LabelStudioMLBase]:
    """The class that Label Studio's server runs; one instance a request, the predictor shared by all."""

    class GroundingDINOBackend(LabelStudioMLBase):  # type: ignore[misc]
        """Answers tasks with the typed prompt, the last one, or the project's labels."""

        def predict(self, tasks: list[dict[str, Any]], context: Any = None, **_: Any) -> ModelResponse:
            control, image_tag, key = self.get_first_tag_occurence("RectangleLabels", "Image")
            project = self.label_interface.get_control(control).labels_attrs
            texts = {label: tag.attr.get("predicted_values") or label for label, tag in project.items()}
            typed = [r["value"]["text"] for r in (context or {}).get("result", []) if r.get("type") == "textarea"]
            prompt = ", ".join(typed[0]) if typed else self.get(PROMPT) or ", ".join(texts.values())
            names = _names(prompt)
            label_of = {name.lower(): label for label, text in texts.items() for name in _names(text)}
            if len(texts) == 1:  # whatever is asked for is that label
                label_of = dict.fromkeys(map(str.lower, names), *texts)
            if unknown := [name for name in names if name.lower() not in label_of]:
                raise ValueError(f"no label for {', '.join(unknown)}: give a Label of the project predicted_values=...")
            question = predictor.encode_prompt(Categories(names))
            if typed:
                self.set(PROMPT, prompt)
            predictions = []
            for task in tasks:
                image = open_image(self.get_local_path(task["data"][key], task_id=task.get("id")))
                (found,) = predictor.stream([image], question, DetectionFilter(threshold))
                labels = [label_of[names[label].lower()] for label in found.labels.tolist()]
                predictions.append(to_label_studio(found, image.size, (control, image_tag), labels))
            return ModelResponse(predictions=predictions)

    return GroundingDINOBackend


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
