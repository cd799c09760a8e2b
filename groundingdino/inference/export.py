"""A detector as graphs that need no Python of ours: ONNX files and torch's exported programs.

    forms = {"model.onnx": TextForm(model)}
    write_onnx(forms, Path("out"), Options(size=(800, 1333)))

The graph is torch.export's: deformable attention becomes GridSample and window attention plain matmuls, so every
operator is ONNX's own. A graph of a fixed size takes smaller images too, padded with zeros on the right and at the
bottom: it finds the padding by itself. A dynamic graph takes any size. One image a call.
`export_check` says how far a written graph is from the model.

Axes: B = 1 image, H/W pixels, L levels, T text tokens, D width, Q queries, C categories.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config
from PIL import Image
from torch import Tensor, nn

from groundingdino import boxes as box_ops
from groundingdino.inference.postprocess import SAME_OBJECT, category_scores
from groundingdino.inference.prompts import ResolvedPrompt
from groundingdino.inputs.images import DEFAULT_SCALE, collate_images, normalize, resize_for_inference, to_tensor
from groundingdino.inputs.text import collate_text, default_tokenizer, finish_caption
from groundingdino.model.backbone import WindowAttention
from groundingdino.model.detector import GroundingDINO
from groundingdino.model.image_tokens import flatten_levels
from groundingdino.ops import ms_deform_attn_reference, window_attention_reference
from groundingdino.ops.ms_deform_attn.op import pairs
from groundingdino.ops.windows import Windows, window_map
from groundingdino.structures import ImageBatch, TextBatch

TOKENIZER_FILE, EXAMPLE_FILE = "tokenizer.json", "example.py"
SIDES = (65, 8192)  # pixels of a dynamic graph's image; its smallest map is then two pixels or more
Size = tuple[int, int]  # (height, width)
Values = dict[str, Tensor]  # by the names of inputs and outputs


@dataclass(frozen=True)
class Options:
    """How a graph is written."""

    size: Size = DEFAULT_SCALE  # of the image that it takes; if dynamic, what a landscape image is fitted into
    opset: int = 20
    fp16: bool = False  # weights and arithmetic in half precision; inputs and outputs stay float32
    dynamic: bool = False  # any height and width


class Form(nn.Module):
    """What a graph takes and gives. `inputs` and `outputs` name them in the order of forward's."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def __init__(self, model: GroundingDINO) -> None:
        super().__init__()
        self.model = model

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes."""
        return self.model.level_embedding.dtype

    def images(self, pixels: Tensor) -> ImageBatch:
        """The batch of one normalised image; pixels (1, 3, H, W)."""
        # No 8-bit pixel is exactly the mean, so zeros are padding. Only the graph knows how much.
        real = (pixels != 0).any(dim=1)
        valid = real.any(dim=2)[:, :, None] & real.any(dim=1)[:, None]
        return ImageBatch(pixels.to(self.dtype), valid, padded=True)


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

    A name with several prompts has the score of the best of them; 0 where a negative of it has a better box of the
    same object, as in `postprocess.fold`.

    Raises:
        ValueError: if the names, with all their prompts and negatives, do not fit into one caption.
    """

    inputs = ("pixels",)
    outputs = ("scores", "boxes")
    tokens: Tensor  # (1, T, D) of the text encoder
    positive_map: Tensor  # (C * P, T) bool, for each name its prompts, the last one repeated up to P
    negative_map: Tensor  # (N, T) bool, the negatives of each of `rivals` one after another
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
        self.rivals = () if prompt.vocabulary is None else prompt.vocabulary.roles.rivals
        self.thresholds = None if prompt.vocabulary is None else prompt.vocabulary.thresholds
        (chunk,) = prompt.chunks
        text = collate_text([chunk.caption], model.config.max_tokens)
        with torch.no_grad():
            tokens = chunk.with_learned(model.encode_text(text)[0], model.config.name)[None]
        assert chunk.positive_map is not None  # a list of names has one
        negatives = chunk.positive_map[[text for _, texts in self.rivals for text in texts]]
        fixed = vars(text) | {
            "tokens": tokens,
            "positive_map": _prompts_by_name(prompt, chunk.positive_map),
            "negative_map": negatives,
        }
        for name, tensor in fixed.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (1, Q, C) in [0, 1] and boxes (1, Q, 4), cxcywh in [0, 1] of the unpadded image."""
        return self.answer(self.images(pixels))

    def answer(self, images: ImageBatch, text: TextBatch | None = None) -> tuple[Tensor, Tensor]:
        """Forward's outputs for one image, padded by a size that is known; for the names, whatever the text."""
        own = TextBatch(self.token_ids, self.position_ids, self.attends, self.valid)
        prediction = self.model.detect(self.model.encode_image(images), self.tokens, own).layers[-1]
        logits, boxes = prediction.logits.float(), prediction.boxes.float()
        scores = category_scores(logits, self.positive_map).unflatten(-1, (len(self.names), -1)).amax(-1)
        return (self._suppressed(scores, logits, boxes) if self.rivals else scores), boxes

    def _suppressed(self, scores: Tensor, logits: Tensor, boxes: Tensor) -> Tensor:
        """The scores, 0 where a negative of the name has a better box of the same object."""
        corners = box_ops.cxcywh_to_xyxy(boxes)
        same = box_ops.iou(corners[:, :, None], corners[:, None], 1e-12) > SAME_OBJECT  # (1, Q, Q)
        columns = list(scores.unbind(-1))
        each = category_scores(logits, self.negative_map).split([len(texts) for _, texts in self.rivals], dim=-1)
        for (name, _), negatives in zip(self.rivals, each, strict=True):
            best = (same * negatives.amax(-1)[:, None]).amax(-1)  # (1, Q): of the boxes of each query's object
            columns[name] = columns[name] * (best <= columns[name])
        return torch.stack(columns, dim=-1)


def _prompts_by_name(prompt: ResolvedPrompt, positive_map: Tensor) -> Tensor:
    """(C * P, T): what `CategoryForm` keeps as its positive map."""
    owners = range(len(prompt.names)) if prompt.vocabulary is None else prompt.vocabulary.roles.owners
    rows = [[row for row, owner in enumerate(owners) if owner == name] for name in range(len(prompt.names))]
    most = max(map(len, rows))
    return positive_map[[row for own in rows for row in own + own[-1:] * (most - len(own))]]


class ImageHalf(Form):
    """An image in; what is computed once for all captions out."""

    inputs = ("pixels",)

    def __init__(self, model: GroundingDINO) -> None:
        super().__init__(model)
        self.outputs = (*level_names(model), "image_valid")

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """L maps (1, D, H_l, W_l), and which pixels are no padding, (1, H, W) bool."""
        images = self.images(pixels)
        levels = self.model.neck(self.model.backbone(images.pixels))
        return (*(level.float() for level in levels), images.valid)


class TextHalf(Form):
    """A caption's tokens in; what is computed once for all images out."""

    inputs = ("token_ids", "position_ids", "attends", "valid")
    outputs = ("text_features",)

    def forward(self, token_ids: Tensor, position_ids: Tensor, attends: Tensor, valid: Tensor) -> tuple[Tensor]:
        """(1, T, D)."""
        return (self.model.encode_text(TextBatch(token_ids, position_ids, attends, valid)).float(),)


class DetectHalf(Form):
    """What the two halves gave in; logits and boxes out, as TextForm's."""

    outputs = ("logits", "boxes")

    def __init__(self, model: GroundingDINO) -> None:
        super().__init__(model)
        self.inputs = ("text_features", "position_ids", "attends", "valid", "image_valid", *level_names(model))

    def forward(
        self, text_features: Tensor, position_ids: Tensor, attends: Tensor, valid: Tensor, image_valid: Tensor,
        level_0: Tensor, level_1: Tensor | None = None, level_2: Tensor | None = None, level_3: Tensor | None = None,
        level_4: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Logits (1, Q, T) before the sigmoid and boxes (1, Q, 4), cxcywh in [0, 1] of the unpadded image."""
        # One by one: a loaded program of torch 2.9 cannot check the sizes of what came as *levels.
        levels = [level for level in (level_0, level_1, level_2, level_3, level_4) if level is not None]
        images = ImageBatch(image_valid[:, None], image_valid, padded=True)
        tokens = flatten_levels([level.to(self.dtype) for level in levels], self.model.level_embedding, images)
        text = TextBatch(position_ids, position_ids, attends, valid)  # the token numbers have had their use
        prediction = self.model.detect(tokens, text_features.to(self.dtype), text).layers[-1]
        return prediction.logits.float(), prediction.boxes.float()


def level_names(model: GroundingDINO) -> tuple[str, ...]:
    """Names of the feature maps."""
    return tuple(f"level_{number}" for number in range(model.config.num_levels))


def halves(model: GroundingDINO) -> dict[str, Form]:
    """The model as three graphs, in the order in which they are run."""
    return {"image.onnx": ImageHalf(model), "text.onnx": TextHalf(model), "detect.onnx": DetectHalf(model)}


def first_values(pixels: Tensor, text: TextBatch) -> Values:
    """Normalised pixels (1, 3, H, W) and a caption under the names of every form's inputs."""
    named = {"pixels": pixels, "token_ids": text.token_ids, "position_ids": text.position_ids}
    named |= {"attends": text.attends, "valid": text.valid}
    named |= {"img": pixels, "input_ids": text.token_ids, "token_type_ids": torch.zeros_like(text.token_ids)}
    return named | {"attention_mask": text.valid, "text_token_mask": text.attends}


def encode_caption(caption: str) -> TextBatch:
    """A batch of one caption, closed by "."."""
    return collate_text([default_tokenizer().encode(finish_caption(caption))])


def fitted_image(image: Image.Image, options: Options) -> ImageBatch:
    """The image, its proportions kept, fitted into the size and padded with zeros as the graph needs it.

    For a dynamic graph it is resized as the predictor does it, and not padded.
    """
    if options.dynamic:
        return collate_images([resize_for_inference(image, (min(options.size), max(options.size))).pixels])
    ratio = min(options.size[0] / image.height, options.size[1] / image.width)
    width, height = max(int(image.width * ratio), 1), max(int(image.height * ratio), 1)
    size = options.size
    pixels, valid = torch.zeros(1, 3, *size), torch.zeros(1, *size, dtype=torch.bool)
    normalize(to_tensor(image.resize((width, height), Image.Resampling.BILINEAR)), out=pixels[0, :, :height, :width])
    valid[:, :height, :width] = True
    return ImageBatch(pixels, valid, padded=(height, width) != size)


def _free_axes(form: Form, name: str, dynamic: bool) -> dict[int, Any]:
    """Axes of an input whose size is not fixed, with their ranges."""
    if name in ("pixels", "img", "image_valid", *level_names(form.model)):
        side = torch.export.Dim.DYNAMIC if name in level_names(form.model) else torch.export.Dim.DYNAMIC(*SIDES)
        first = 1 if name == "image_valid" else 2
        return {first: side, first + 1: side} if dynamic else {}
    tokens = torch.export.Dim("tokens", min=3, max=form.model.config.max_tokens)
    return {1: tokens, 2: tokens} if name in ("attends", "text_token_mask") else {1: tokens}


def export_program(form: Form, values: Values, dynamic: bool = False) -> torch.export.ExportedProgram:
    """The form as a graph of aten operators, for images of one size or, if dynamic, any, and any number of text tokens.

    `values` are inputs to trace it with. The form's parameters no longer require gradients.
    """
    arguments = tuple(values[name] for name in form.inputs)
    shapes: Any = tuple(_free_axes(form, name, dynamic) for name in form.inputs)
    for module in form.modules():
        if isinstance(module, WindowAttention):
            module.position_bias()  # what it keeps for later calls must not come from the trace
    with _any_size():
        return torch.export.export(form.requires_grad_(False), arguments, dynamic_shapes=shapes, strict=False)


def _any_size() -> Any:
    """A context in which a map that happens to be one window wide does not make a graph for such maps alone."""
    return torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]


def write_onnx(forms: Mapping[str, Form], folder: Path, options: Options) -> None:
    """Write graphs under their file names, in the order in which they are run, and what their users need.

    That is the tokenizer and, for our names of the inputs, an example program. The files have passed onnx.checker with
    shape inference. Needs the extra `export`.
    """
    values = first_values(torch.randn(1, 3, *options.size), encode_caption("a cat. remote control."))
    for file, form in forms.items():
        form = deepcopy(form).half() if options.fp16 else form
        _write_graph(form, values, folder / file, options)
        if len(forms) > 1:
            values |= zip(form.outputs, form(*(values[name] for name in form.inputs)), strict=True)
    default_tokenizer().save(folder / TOKENIZER_FILE)
    if all("img" not in form.inputs for form in forms.values()):  # it feeds our names of the inputs
        shutil.copy(Path(__file__).with_name("onnx_example.py"), folder / EXAMPLE_FILE)


def _write_graph(form: Form, values: Values, file: Path, options: Options) -> None:
    import onnx

    with _any_size():
        operators = export_program(form, values, options.dynamic).run_decompositions({
            torch.ops.groundingdino.ms_deform_attn.default: _deformable_attention,
            torch.ops.groundingdino.window_attention.default: _window_attention,
            torch.ops.groundingdino.window_map.default: window_map,
        })  # fmt: skip
        program = torch.onnx.export(
            operators,
            dynamo=True,
            opset_version=options.opset,
            input_names=list(form.inputs),
            output_names=list(form.outputs),
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(_metadata(form, options))
    program.save(file)
    del program
    onnx.checker.check_model(file, full_check=True)


def _deformable_attention(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return ms_deform_attn_reference(value, pairs(shapes), locations, weights)


def _window_attention(
    qkv: Tensor, padding: Tensor, bias: Tensor, token: Tensor, place: Tensor, mask: Tensor | None
) -> Tensor:
    return window_attention_reference(qkv, padding, bias, Windows(token, place, mask))


def _metadata(form: Form, options: Options) -> dict[str, str]:
    facts: dict[str, Any] = {"model": form.model.config.name, "fp16": options.fp16}
    facts |= {"size": options.size, "dynamic": options.dynamic}
    if isinstance(form, CategoryForm):
        facts |= {"names": form.names, "thresholds": form.thresholds}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
