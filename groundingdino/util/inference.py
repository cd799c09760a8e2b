"""`groundingdino.util.inference` of IDEA-Research/GroundingDINO, answered by this library's model.

Code that imports `load_model, load_image, predict, annotate, Model` from here keeps running: the signatures and the
return types are IDEA's. What differs, because the model or the promise does:

* `model_config_path` need not exist: weights tell their size. Where it does, its sizes must be those of the weights.
* `model_checkpoint_path` may be IDEA's .pth or any other file that is there, which is converted in memory; or whatever
  else `checkpoints.resolve` takes, also a name such as "mm-gdino-b", which fills the cache.
* `device` defaults to the best device there is, not to "cuda".
* `load_image` honours the EXIF orientation.
* `predict_with_classes` scores a class by the mean over its own tokens, so that it always has a class id and
  `text_threshold` is not needed; IDEA searches the class name in the phrase.

`Model` returns `supervision.Detections`, so it needs supervision; the functions do not.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from groundingdino import checkpoints
from groundingdino.boxes import cxcywh_to_xyxy
from groundingdino.checkpoints.convert import read_detector
from groundingdino.checkpoints.hub import native_file
from groundingdino.checkpoints.model_file import load_detector
from groundingdino.inference.engine import Engine
from groundingdino.inference.predictor import Predictor
from groundingdino.inference.prompts import Referring, resolve
from groundingdino.inference.visualize import draw_detections
from groundingdino.inputs.images import ImageGeometry, normalize, open_image, resize_for_inference
from groundingdino.inputs.text import SEPARATORS, EncodedCaption, default_tokenizer
from groundingdino.model import GroundingDINO
from groundingdino.models import contradictions
from groundingdino.runtime import devices
from groundingdino.structures import Detections, ImageBatch
from groundingdino.util.slconfig import SLConfig
from groundingdino.util.utils import Tokenizer

if TYPE_CHECKING:
    import supervision

Device = str | torch.device


def preprocess_caption(caption: str) -> str:
    """Lower case, stripped, with a final "."."""
    result = caption.lower().strip()
    return result if result.endswith(".") else result + "."


def load_model(
    model_config_path: str | Path | None,
    model_checkpoint_path: str | Path,
    device: Device = "auto",
    text_encoder_type: str | Path | None = None,
) -> GroundingDINO:
    """The model of IDEA's weights, ours, or any others that `checkpoints.resolve` takes.

    Args:
        model_config_path: IDEA's config file; checked against the weights where it exists.
        text_encoder_type: not used: vocabulary and BERT are in the package and the weights.
    Raises:
        ValueError: weights that cannot be used, or of other sizes than the config file says.
    """
    path, chosen = Path(model_checkpoint_path), devices.pick_device(str(device))
    if path.exists() and native_file(path) is None:
        model = read_detector(path, chosen)
    else:
        model = load_detector(checkpoints.resolve(model_checkpoint_path), chosen)
    if model_config_path is not None and Path(model_config_path).is_file():
        wrong = contradictions(SLConfig.fromfile(model_config_path), model.config)
        if wrong:
            raise ValueError(f"{model_config_path} is not of these weights: {'; '.join(wrong)}")
    vars(model)["tokenizer"] = Tokenizer()  # which clients fetch from the model
    return model


def load_image(image_path: str | Path) -> tuple[np.ndarray, Tensor]:
    """The (H, W, 3) uint8 RGB image, and as the model takes it: (3, h, w), resized and normalised."""
    image = open_image(image_path)
    return np.asarray(image), _prepared(image)


def _prepared(image: Image.Image) -> Tensor:
    return normalize(resize_for_inference(image).pixels)


def predict(
    model: GroundingDINO,
    image: Tensor,
    caption: str,
    box_threshold: float,
    text_threshold: float,
    device: Device | None = None,
    remove_combined: bool = False,
) -> tuple[Tensor, Tensor, list[str]]:
    """Boxes whose best token exceeds `box_threshold`, and the words over `text_threshold` as their phrases.

    Args:
        image: (3, h, w) from `load_image`.
        caption: "cat . remote control ." or a sentence.
        device: where the model is moved; default is where it is.
        remove_combined: only words of the best token's sub-sentence, so that names are never merged.

    Returns:
        boxes (N, 4) cxcywh in [0, 1], scores (N,), phrases; on the CPU.
    Raises:
        ValueError: a caption of more than 256 tokens, which IDEA's code cuts off.
    """
    caption = preprocess_caption(caption)
    prompt = resolve(Referring(caption), default_tokenizer(), model.config.max_tokens)
    if device is not None:
        model = model.to(devices.pick_device(str(device)))
    engine = Engine(model)
    height, width = image.shape[1:]
    valid = torch.ones(1, height, width, dtype=torch.bool)
    geometry = ImageGeometry((height, width), (1.0, 1.0))
    (encoded_image,) = engine.encode_batch(ImageBatch(image[None], valid, padded=False), [geometry])
    (encoded_prompt,) = engine.encode_prompts([prompt])
    ((logits, boxes),) = engine.token_logits(encoded_image, encoded_prompt)
    encoded = prompt.chunks[0].caption
    scores = logits.sigmoid().cpu()  # (Q, T)
    chosen = scores.amax(dim=1) > box_threshold
    scores, boxes = scores[chosen], boxes.cpu()[chosen]
    phrases = [phrase_of(row, encoded, caption, text_threshold, remove_combined) for row in scores]
    return boxes, scores.amax(dim=1), phrases


def phrase_of(scores: Tensor, encoded: EncodedCaption, caption: str, threshold: float, one_sub_sentence: bool) -> str:
    """The caption's words whose tokens exceed the threshold, without separators; pieces of a word stay together."""
    tokens = range(1, len(encoded.token_ids) - 1)
    if one_sub_sentence:
        ends = [i for i, token in enumerate(encoded.token_ids) if token in SEPARATORS.values()]
        best = int(scores.argmax())
        tokens = range(max((i for i in ends if i < best), default=0) + 1, min(i for i in ends if i >= best))
    words, previous_end = "", -1
    for token in tokens:
        if scores[token] <= threshold or encoded.token_ids[token] in SEPARATORS.values():
            continue
        start, end = encoded.offsets[token]
        words += ("" if start == previous_end or not words else " ") + caption[start:end]
        previous_end = end
    return words


def annotate(image_source: np.ndarray, boxes: Tensor, logits: Tensor, phrases: list[str]) -> np.ndarray:
    """(H, W, 3) RGB image, `predict`'s answer -> (H, W, 3) BGR picture with labelled boxes."""
    height, width, _ = image_source.shape
    pixels = cxcywh_to_xyxy(boxes) * torch.tensor([width, height, width, height])
    labels = torch.arange(len(boxes))
    drawn = draw_detections(Image.fromarray(image_source), Detections(pixels, logits, labels, tuple(phrases)))
    return np.ascontiguousarray(np.asarray(drawn)[:height, :width, ::-1])


class Model:
    """A loaded model that takes OpenCV images and returns `supervision.Detections`."""

    def __init__(
        self, model_config_path: str | Path | None, model_checkpoint_path: str | Path, device: Device = "auto"
    ) -> None:
        self.model = load_model(model_config_path, model_checkpoint_path, device)
        self.device = next(self.model.parameters()).device

    def _predictor(self) -> Predictor:
        """Of `model`, which clients set themselves after `Model.__new__(Model)`."""
        made = self.__dict__.get("_made")
        if made is None or made.model is not self.model:
            made = self.__dict__["_made"] = Predictor(self.model)
        return made

    def predict_with_caption(
        self, image: np.ndarray, caption: str, box_threshold: float = 0.35, text_threshold: float = 0.25
    ) -> tuple["supervision.Detections", list[str]]:
        """(H, W, 3) BGR image -> detections without class ids, and a phrase for each."""
        prepared = Model.preprocess_image(image)
        boxes, logits, phrases = predict(self.model, prepared, caption, box_threshold, text_threshold)
        height, width = image.shape[:2]
        return Model.post_process_result(height, width, boxes, logits), phrases

    def predict_with_classes(
        self, image: np.ndarray, classes: list[str], box_threshold: float, text_threshold: float
    ) -> "supervision.Detections":
        """(H, W, 3) BGR image -> detections whose class_id is the index in `classes`, one class a box."""
        found = self._predictor().predict(_rgb(image), categories=classes, threshold=box_threshold)
        assert isinstance(found, Detections)
        best = {tuple(box): row for row, box in reversed(list(enumerate(found.boxes.tolist())))}
        rows = sorted(best.values())
        names = tuple(found.names[row] for row in rows)
        from groundingdino.integrations.supervision import to_supervision

        return to_supervision(Detections(found.boxes[rows], found.scores[rows], found.labels[rows], names))

    @staticmethod
    def preprocess_image(image_bgr: np.ndarray) -> Tensor:
        """(H, W, 3) BGR -> (3, h, w) as the model takes it."""
        return _prepared(Image.fromarray(_rgb(image_bgr)))

    @staticmethod
    def post_process_result(source_h: int, source_w: int, boxes: Tensor, logits: Tensor) -> "supervision.Detections":
        """cxcywh boxes in [0, 1] -> detections in pixels."""
        import supervision

        pixels = cxcywh_to_xyxy(boxes) * torch.tensor([source_w, source_h, source_w, source_h])
        return supervision.Detections(xyxy=pixels.numpy().reshape(-1, 4), confidence=logits.numpy())

    @staticmethod
    def phrases2classes(phrases: list[str], classes: list[str]) -> np.ndarray:
        """For each phrase the index of the first class that it contains, else None."""
        found: list[Any] = [next((i for i, name in enumerate(classes) if name in phrase), None) for phrase in phrases]
        return np.array(found)


def _rgb(image_bgr: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image_bgr[:, :, ::-1])
