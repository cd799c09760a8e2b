"""MM-Grounding-DINO in plain PyTorch. The public names below are imported when they are first used."""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from groundingdino.runtime import bootstrap, other_distributions

if TYPE_CHECKING:
    from groundingdino.config import MODEL_PRESETS as MODEL_PRESETS
    from groundingdino.config import ModelConfig as ModelConfig
    from groundingdino.inference.learned_prompt import LearnedPrompt as LearnedPrompt
    from groundingdino.inference.predictor import Predictor as Predictor
    from groundingdino.inference.predictor import load_model as load_model
    from groundingdino.inference.prompts import Categories as Categories
    from groundingdino.inference.prompts import Phrases as Phrases
    from groundingdino.inference.prompts import Referring as Referring
    from groundingdino.inference.prompts import Spans as Spans
    from groundingdino.inference.results import to_coco as to_coco
    from groundingdino.inference.results import to_json as to_json
    from groundingdino.inference.visualize import draw_detections as draw_detections
    from groundingdino.inference.vocabulary import Vocabulary as Vocabulary
    from groundingdino.inference.vocabulary import read_vocabulary as read_vocabulary
    from groundingdino.integrations.sam import masks as masks
    from groundingdino.integrations.sam import to_sam_boxes as to_sam_boxes
    from groundingdino.integrations.supervision import to_supervision as to_supervision
    from groundingdino.model import build_detector as build_detector
    from groundingdino.runtime.devices import tune_process as tune_process
    from groundingdino.structures import Detections as Detections
    from groundingdino.training.callback import Callback as Callback
    from groundingdino.training.finetune import finetune as finetune
    from groundingdino.training.learn_prompt import PromptLearning as PromptLearning
    from groundingdino.training.learn_prompt import learn_prompt as learn_prompt

__version__ = "0.2.0"  # the only place; pyproject.toml reads it here

_HOME_OF_NAME = {
    "MODEL_PRESETS": "config",
    "ModelConfig": "config",
    "draw_detections": "inference.visualize",
    "build_detector": "model",
    "Predictor": "inference.predictor",
    "load_model": "inference.predictor",
    "Categories": "inference.prompts",
    "Phrases": "inference.prompts",
    "Referring": "inference.prompts",
    "Spans": "inference.prompts",
    "to_coco": "inference.results",
    "to_json": "inference.results",
    "Vocabulary": "inference.vocabulary",
    "read_vocabulary": "inference.vocabulary",
    "masks": "integrations.sam",
    "to_sam_boxes": "integrations.sam",
    "to_supervision": "integrations.supervision",
    "tune_process": "runtime.devices",
    "Detections": "structures",
    "Callback": "training.callback",
    "finetune": "training.finetune",
    "LearnedPrompt": "inference.learned_prompt",
    "PromptLearning": "training.learn_prompt",
    "learn_prompt": "training.learn_prompt",
}

__all__ = list(_HOME_OF_NAME)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF_NAME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


bootstrap.import_torch_without_cann()
if _problem := other_distributions.warning():
    warnings.warn(_problem, stacklevel=2)
