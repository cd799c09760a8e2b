"""groundingdino, used as its commands use it. See `worker`."""

import time
from pathlib import Path
from typing import Any

# isort: split
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.matrix_bound import MatrixWork, rates
from groundingdino.checkpoints.model_file import load_detector
from groundingdino.evaluation.metrics import AP_DETECTIONS
from groundingdino.inference.engine import Engine
from groundingdino.inference.predictor import Predictor
from groundingdino.inference.prompts import Categories, Referring, resolve
from groundingdino.inputs.images import ImageGeometry, ResizedImage
from groundingdino.inputs.text import default_tokenizer
from groundingdino.runtime import distributed, threads
from groundingdino.runtime.devices import tune_process
from groundingdino.structures import ImageBatch, Targets, TextBatch
from groundingdino.training.criterion import Criterion
from groundingdino.training.learner import TrainingStep

Inputs = dict[str, Tensor]


def images_of(inputs: Inputs, dtype: torch.dtype = torch.float32) -> ImageBatch:
    """Images without padding."""
    pixels = inputs["pixels"].to(dtype)
    return ImageBatch(pixels, torch.ones(len(pixels), *pixels.shape[2:], dtype=torch.bool), padded=False)


def text_of(inputs: Inputs) -> TextBatch:
    """The captions."""
    return TextBatch(*(inputs[name] for name in ("token_ids", "position_ids", "attends", "valid")))


def targets_of(inputs: Inputs) -> Targets:
    """One object or more in each image, the same number in all."""
    boxes, labels = inputs["boxes"], inputs["labels"]
    batch, count = labels.shape
    return Targets(boxes, inputs["positive_map"], labels, torch.ones_like(labels, dtype=torch.bool), (count,) * batch)


class Side:
    """The model and what the benchmarks ask of it."""

    def __init__(self, folder: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        tune_process(torch.device("cpu"))  # as every program of the library does
        self.device = distributed.init("cpu").device
        self.model = load_detector(folder / "ours.safetensors")
        self.predictor = Predictor(self.model)
        step: nn.Module = TrainingStep(self.model, Criterion(), "fp32")
        if distributed.world_size() > 1:
            step = DistributedDataParallel(step, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.step = step

    def forget(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Leave the process group."""
        distributed.shutdown()

    def compile(self) -> dict[str, float]:
        """From now on `predict` runs the model as torch compiles it."""
        self.predictor = Predictor(self.model, compile=True)
        return {}

    def to_bfloat16(self) -> dict[str, float]:
        """From now on weights and images are in bfloat16."""
        self.model.bfloat16()
        return {}

    @torch.inference_mode()
    def infer(self, inputs: Inputs) -> dict[str, Tensor]:
        """scores (B, Q) of the best token, boxes (B, Q, 4) cxcywh in [0, 1]."""
        dtype = next(self.model.parameters()).dtype
        last = self.model(images_of(inputs, dtype), text_of(inputs)).layers[-1]
        return {"scores": last.logits.amax(-1).sigmoid().float(), "boxes": last.boxes.float()}

    def predict(self, inputs: Inputs) -> dict[str, Tensor]:
        """One image from its pixels to boxes, as the predictor is used: its scores, falling."""
        height, width = inputs["photograph"].shape[1:]
        self.predictor.scale = min(height, width), max(height, width)  # as it is
        sentence = "the man in the red shirt on the left"
        return {"scores": self.predictor.predict(inputs["photograph"], referring=sentence, top_k=300).scores}

    @torch.inference_mode()
    def image_half(self, inputs: Inputs) -> dict[str, float]:
        """What is computed once for all prompts of an image."""
        self.model.encode_image(images_of(inputs))
        return {}

    def train(self, inputs: Inputs, checkpointing: bool) -> dict[str, float]:
        """Forward, loss and backward, denoising queries included."""
        threads.adjust()  # as `Learner.step` does
        self.model.train().set_activation_checkpointing(checkpointing)
        loss = self.step(images_of(inputs), text_of(inputs), targets_of(inputs))["loss"]
        loss.backward()
        self.model.eval()
        return {"loss": float(loss.detach())}

    def sentences(self, inputs: Inputs, captions: list[str], batch_size: int) -> dict[str, Tensor]:
        """As the evaluator asks: scores (sentences, K) falling, boxes (sentences, K, 4) in pixels."""
        engine = Engine(self.model, pairs_per_pass=batch_size)
        pixels = inputs["photograph"]
        geometry = ImageGeometry((pixels.shape[1], pixels.shape[2]), (1.0, 1.0))
        (image,) = engine.encode_images([ResizedImage(pixels, geometry)])
        prompts = engine.encode_prompts([resolve(Referring(caption), default_tokenizer()) for caption in captions])
        answers = list(engine.rank([(image, prompt) for prompt in prompts], AP_DETECTIONS))
        return {"boxes": torch.stack([a.boxes for a in answers]), "scores": torch.stack([a.scores for a in answers])}

    def categories(self, inputs: Inputs, names: list[str]) -> dict[str, float]:
        """As the predictor is used; how many captions the names were split into, and names of the first of them."""
        prompt = self.predictor.encode_prompt(Categories(names))
        height, width = inputs["photograph"].shape[1:]
        self.predictor.scale = min(height, width), max(height, width)  # as it is
        self.predictor.predict(inputs["photograph"], prompt)
        chunks = prompt.resolved.chunks
        return {"pieces": len(chunks), "first": chunks[1].first_label if len(chunks) > 1 else len(names)}

    def matrix_work(self, inputs: Inputs, of: str, **arguments: Any) -> dict[str, float]:
        """Matrix FLOPs of the call `of`, deformable attention excluded; remembers the shapes for `matrix_rate`."""
        with MatrixWork() as work:
            getattr(self, of)(inputs, **arguments)
        self.shapes = work.shapes
        return {"flops": work.flops}

    def matrix_rate(self) -> dict[str, float]:
        """FLOPs a second of addmm and of our linear layers at the sizes that carry most of the counted work."""
        started = time.perf_counter()
        return {**rates(self.shapes), "took": time.perf_counter() - started}
