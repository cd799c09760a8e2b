"""A detector as an ONNX file that needs no Python of ours, and how far onnxruntime's answers are from the model's.

    write_onnx(model, TextForm, Path("out"), Options(size=(800, 1333)))

The graph is torch.export's: deformable attention becomes GridSample and window attention plain matmuls, so every
operator is ONNX's own. A graph of a fixed size takes smaller images too, padded with zeros on the right and at the
bottom: it finds the padding by itself. One image a call.

Axes: B = 1 image, H/W pixels, T text tokens, Q queries, C categories.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from groundingdino.inference.postprocess import category_scores
from groundingdino.inference.prompts import ResolvedPrompt
from groundingdino.inputs.images import DEFAULT_SCALE, normalize, to_tensor
from groundingdino.inputs.text import collate_text, default_tokenizer, finish_caption
from groundingdino.model.detector import GroundingDINO
from groundingdino.ops import ms_deform_attn_reference, window_attention_reference
from groundingdino.ops.ms_deform_attn.op import pairs
from groundingdino.ops.window_attention import Windows
from groundingdino.structures import ImageBatch, TextBatch

MODEL_FILE, TOKENIZER_FILE, EXAMPLE_FILE = "model.onnx", "tokenizer.json", "example.py"
TOLERANCE = 1e-3  # largest difference of a logit, score or box that a float32 export may have
BEST = 10  # detections that are compared as a set
Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Options:
    """How a graph is written."""

    size: Size = DEFAULT_SCALE  # of the image that it takes
    opset: int = 20
    fp16: bool = False  # weights and arithmetic in half precision; inputs and outputs stay float32


@dataclass(frozen=True)
class Parity:
    """How far onnxruntime's answer for one image is from the model's."""

    scores: float  # the largest difference of a logit or score
    boxes: float  # the largest difference of a coordinate, of the image's side
    rows: int  # queries
    rows_apart: int  # queries with a difference beyond TOLERANCE
    same_detections: bool  # whether the BEST detections are the same
    seconds: float  # of onnxruntime
    seconds_here: float  # of the model with its own kernels

    @property
    def within(self) -> bool:
        """Whether every number is within TOLERANCE, and the best detections are the same."""
        return self.rows_apart == 0 and self.same_detections


class Form(nn.Module):
    """What a graph takes and gives. `inputs` and `outputs` name them in the order of forward's."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def __init__(self, model: GroundingDINO) -> None:
        super().__init__()
        self.model = model

    def images(self, pixels: Tensor) -> ImageBatch:
        """The batch of one normalised image; pixels (1, 3, H, W)."""
        # No 8-bit pixel is exactly the mean, so zeros are padding. Its size is known to the graph alone: none is given.
        real = (pixels != 0).any(dim=1)
        valid = real.any(dim=2)[:, :, None] & real.any(dim=1)[:, None]
        return ImageBatch(pixels.to(self.model.level_embedding.dtype), valid, ((0, 0),) * len(pixels))

    def answer(self, images: ImageBatch, text: TextBatch) -> tuple[Tensor, Tensor]:
        """Forward's outputs for one image, padded by a size that is known."""
        raise NotImplementedError


class TextForm(Form):
    """An image and a caption's tokens in; logits and boxes out."""

    inputs: tuple[str, ...] = ("pixels", "token_ids", "position_ids", "attends", "valid")
    outputs = ("logits", "boxes")

    def forward(
        self, pixels: Tensor, token_ids: Tensor, position_ids: Tensor, attends: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits (1, Q, T) before the sigmoid and boxes (1, Q, 4), cxcywh in [0, 1] of the unpadded image."""
        return self.answer(self.images(pixels), TextBatch(token_ids, position_ids, attends, valid))

    def answer(self, images: ImageBatch, text: TextBatch) -> tuple[Tensor, Tensor]:
        """Forward's outputs for one image, padded by a size that is known."""
        prediction = self.model(images, text).layers[-1]
        return prediction.logits.float(), prediction.boxes.float()


class XAnyLabelingForm(TextForm):
    """TextForm under the names that X-AnyLabeling feeds."""

    inputs = ("img", "input_ids", "token_type_ids", "position_ids", "attention_mask", "text_token_mask")

    def forward(  # type: ignore[override]
        self, img: Tensor, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, attention_mask: Tensor,
        text_token_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As TextForm; the token types, which are all zero, are not used."""
        return super().forward(img, input_ids, position_ids, text_token_mask, attention_mask)


class CategoryForm(Form):
    """An image in; boxes and one score for each name out. The text is part of the graph, the text encoder is not.

    Raises:
        ValueError: if the names do not fit into one caption.
    """

    inputs = ("pixels",)
    outputs = ("scores", "boxes")
    tokens: Tensor  # (1, T, D) of the text encoder
    positive_map: Tensor  # (C, T) bool
    token_ids: Tensor
    position_ids: Tensor
    attends: Tensor
    valid: Tensor

    def __init__(self, model: GroundingDINO, prompt: ResolvedPrompt) -> None:
        super().__init__(model)
        if len(prompt.chunks) > 1:
            first = prompt.chunks[1].first_label
            raise ValueError(
                f"{len(prompt.names)} names need {len(prompt.chunks)} captions, and an exported graph has one: export "
                f"the first {first} and the others apart"
            )
        self.names = prompt.names
        text = collate_text([prompt.chunks[0].caption], model.config.max_tokens)
        with torch.no_grad():
            tokens = model.encode_text(text)
        fixed = vars(text) | {"tokens": tokens, "positive_map": prompt.chunks[0].positive_map}
        for name, tensor in fixed.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (1, Q, C) in [0, 1] and boxes (1, Q, 4), cxcywh in [0, 1] of the unpadded image."""
        return self.answer(self.images(pixels))

    def answer(self, images: ImageBatch, text: TextBatch | None = None) -> tuple[Tensor, Tensor]:
        """Forward's outputs for one image, padded by a size that is known; for the names, whatever the text."""
        own = TextBatch(self.token_ids, self.position_ids, self.attends, self.valid)
        prediction = self.model.detect(self.model.encode_image(images), self.tokens, own).layers[-1]
        return category_scores(prediction.logits.float(), self.positive_map), prediction.boxes.float()


def inputs_for(form: Form, pixels: Tensor, text: TextBatch) -> tuple[Tensor, ...]:
    """The arguments of the form's forward for normalised pixels (1, 3, H, W)."""
    named = {"pixels": pixels, "token_ids": text.token_ids, "position_ids": text.position_ids}
    named |= {"attends": text.attends, "valid": text.valid}
    named |= {"img": pixels, "input_ids": text.token_ids, "token_type_ids": torch.zeros_like(text.token_ids)}
    named |= {"attention_mask": text.valid, "text_token_mask": text.attends}
    return tuple(named[name] for name in form.inputs)


def encode_caption(caption: str) -> TextBatch:
    """A batch of one caption, closed by "."."""
    return collate_text([default_tokenizer().encode(finish_caption(caption))])


def fitted_image(image: Image.Image, size: Size) -> ImageBatch:
    """The image, its proportions kept, fitted into `size` and padded with zeros."""
    ratio = min(size[0] / image.height, size[1] / image.width)
    width, height = max(int(image.width * ratio), 1), max(int(image.height * ratio), 1)
    pixels, valid = torch.zeros(1, 3, *size), torch.zeros(1, *size, dtype=torch.bool)
    normalize(to_tensor(image.resize((width, height), Image.Resampling.BILINEAR)), out=pixels[0, :, :height, :width])
    valid[:, :height, :width] = True
    return ImageBatch(pixels, valid, ((height, width),))


def export_program(form: Form, size: Size) -> torch.export.ExportedProgram:
    """The form as a graph of aten operators, for images of one size and any number of text tokens.

    The form's parameters no longer require gradients.
    """
    arguments = inputs_for(form, torch.randn(1, 3, *size), encode_caption("a cat. remote control."))
    tokens = torch.export.Dim("tokens", min=3, max=form.model.config.max_tokens)
    shapes = tuple({} if each.dim() == 4 else dict.fromkeys(range(1, each.dim()), tokens) for each in arguments)
    program = torch.export.export(form.requires_grad_(False), arguments, dynamic_shapes=shapes, strict=False)
    return program.run_decompositions({
        torch.ops.groundingdino.ms_deform_attn.default: _deformable_attention,
        torch.ops.groundingdino.window_attention.default: _window_attention,
    })  # fmt: skip


def _deformable_attention(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return ms_deform_attn_reference(value, pairs(shapes), locations, weights)


def _window_attention(
    qkv: Tensor, padding: Tensor, bias: Tensor, token: Tensor, place: Tensor, mask: Tensor | None
) -> Tensor:
    return window_attention_reference(qkv, padding, bias, Windows(token, place, mask))


def write_onnx(form: Form, folder: Path, options: Options) -> None:
    """Write the model, and what its users need, into a folder: the tokenizer and an example program.

    The file has passed onnx.checker with shape inference. Needs the extra `export`.
    """
    import onnx

    if options.fp16:
        form = form.half()
    program = torch.onnx.export(
        export_program(form, options.size),
        dynamo=True,
        opset_version=options.opset,
        input_names=list(form.inputs),
        output_names=list(form.outputs),
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(_metadata(form, options))
    program.save(folder / MODEL_FILE)
    onnx.checker.check_model(folder / MODEL_FILE, full_check=True)
    default_tokenizer().save(folder / TOKENIZER_FILE)
    shutil.copy(Path(__file__).with_name("onnx_example.py"), folder / EXAMPLE_FILE)


def _metadata(form: Form, options: Options) -> dict[str, str]:
    facts: dict[str, Any] = {"model": form.model.config.name, "fp16": options.fp16}
    if isinstance(form, CategoryForm):
        facts["names"] = list(form.names)
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


@dataclass(frozen=True)
class Answer:
    """The two outputs of a form for one image."""

    scores: np.ndarray  # (Q, T) logits, or (Q, C) scores
    boxes: np.ndarray  # (Q, 4) cxcywh in [0, 1] of the unpadded image
    seconds: float


@torch.no_grad()
def answer_here(form: Form, images: ImageBatch, text: TextBatch) -> Answer:
    """The model's own answer, with its kernels and the sizes that a graph does not know; the second of two runs."""
    form.answer(images, text)
    started = time.perf_counter()
    scores, boxes = form.answer(images, text)
    return Answer(scores[0].numpy(), boxes[0].numpy(), time.perf_counter() - started)


class Session:
    """An ONNX file on the CPU, with as many threads as torch has."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def answer(self, form: Form, images: ImageBatch, text: TextBatch) -> Answer:
        """The graph's answer; the second of two runs."""
        given = zip(form.inputs, inputs_for(form, images.pixels, text), strict=True)
        inputs = {name: tensor.numpy() for name, tensor in given}
        self._session.run(None, inputs)
        started = time.perf_counter()
        scores, boxes = self._session.run(None, inputs)
        return Answer(scores[0], boxes[0], time.perf_counter() - started)


def compare(found: Answer, expected: Answer) -> Parity:
    """Row by row, and the best detections as sets."""
    apart_scores = _apart(found.scores, expected.scores)
    apart_boxes = _apart(found.boxes, expected.boxes)
    return Parity(
        scores=float(apart_scores.max()),
        boxes=float(apart_boxes.max()),
        rows=len(apart_boxes),
        rows_apart=int((np.maximum(apart_scores, apart_boxes) > TOLERANCE).sum()),
        same_detections=_found_again(found, expected),
        seconds=found.seconds,
        seconds_here=expected.seconds,
    )


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(Q,) the largest difference in each row; equal infinities, at padded tokens, do not differ."""
    with np.errstate(invalid="ignore"):
        return np.where(a == b, 0.0, np.abs(a - b)).max(axis=1)


def _found_again(found: Answer, expected: Answer) -> bool:
    """Whether each of the BEST rows has an equal one, in whatever row: nearly tied proposals may change places."""
    scores = expected.scores.max(axis=1)
    for row in np.argsort(-scores)[:BEST]:
        apart = np.abs(found.boxes - expected.boxes[row]).max(axis=1)
        apart = np.maximum(apart, _apart(found.scores, np.broadcast_to(expected.scores[row], found.scores.shape)))
        if apart.min() > TOLERANCE:
            return False
    return True
