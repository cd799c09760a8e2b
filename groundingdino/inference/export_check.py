"""How far onnxruntime's answers for exported graphs are from the model's own.

The gaps between ranked proposals can be smaller than rounding, and a proposal's rank picks its content embedding: where
two change places, all of their rows differ, and others a little. Nothing about that is wrong. So the graph is first
asked which proposals it chose; these must be the best to within a tolerance. Then the model is given the same ones, and
every row must agree to within it.

Axes: S image tokens, Q queries, T text tokens, C categories.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from groundingdino.inference.export import CategoryForm, Form, TextForm, first_values
from groundingdino.structures import ImageBatch, TextBatch

TOLERANCE = 1e-3  # largest difference of a logit, score or box that a float32 export may have
HALF_TOLERANCE = 2e-2  # the same of a float16 export, against the model in float32
BEST = 10  # detections that are compared as a set
CHOSEN = "chosen"  # what the graph's selection of proposals is called while it is checked


@dataclass(frozen=True)
class Answer:
    """What a model or a graph says of one image."""

    scores: np.ndarray  # (Q, T) logits, or (Q, C) scores
    boxes: np.ndarray  # (Q, 4) cxcywh in [0, 1] of the unpadded image
    chosen: np.ndarray  # (Q,) image tokens that became proposals
    seconds: float


@dataclass(frozen=True)
class Parity:
    """How far the graphs' answer for one image is from the model's."""

    selection: float  # how much less a proposal of the graph's scores than the model's of that rank
    other_proposals: int  # of the graph's that the model has not, or at another rank
    scores: float  # the largest difference of a logit or score, with the same proposals
    boxes: float  # the largest difference of a coordinate, of the image's side
    rows: int  # queries
    rows_apart: int  # queries with a difference beyond `tolerance`
    same_detections: int  # how many of the model's BEST detections, with proposals of its own, the graph has
    seconds: float  # of onnxruntime
    seconds_here: float  # of the model with its own kernels
    tolerance: float

    @property
    def within(self) -> bool:
        """Whether every number is within `tolerance`."""
        return self.rows_apart == 0 and self.selection <= self.tolerance


class _Selection(TorchFunctionMode):
    """Sees which image tokens the model chooses, and how all of them score; or chooses the given ones instead."""

    def __init__(self, given: Tensor | None = None) -> None:
        super().__init__()
        self.given = given
        self.scores = self.chosen = torch.empty(0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is not Tensor.topk:
            return found
        self.scores, self.chosen = args[0][0], found.indices[0]
        return found if self.given is None else torch.return_types.topk((found.values, self.given[None]))


class Model:
    """A detector that answers for one image, its padding known."""

    def __init__(self, form: Form, tolerance: float = TOLERANCE) -> None:
        self.tolerance = tolerance
        # Parts of a model, or other names for its inputs, answer as the whole does.
        self.form = form if isinstance(form, CategoryForm) else TextForm(form.model)

    @torch.no_grad()
    def answer(self, images: ImageBatch, text: TextBatch) -> Answer:
        """With proposals of its own; the time is that of the second of two runs."""
        self.form.answer(images, text)
        with _Selection() as selection:
            started = time.perf_counter()
            scores, boxes = self.form.answer(images, text)
            seconds = time.perf_counter() - started
        return Answer(scores[0].numpy(), boxes[0].numpy(), selection.chosen.numpy(), seconds)

    @torch.no_grad()
    def answer_with(self, chosen: np.ndarray, images: ImageBatch, text: TextBatch) -> tuple[Answer, float]:
        """With the given proposals; and how much less than the model's own of the same rank one scores, at the most."""
        with _Selection(torch.from_numpy(chosen)) as selection:
            scores, boxes = self.form.answer(images, text)
        ranked = selection.scores.sort(descending=True).values[: len(chosen)]
        less = ranked - selection.scores[selection.given]
        return Answer(scores[0].numpy(), boxes[0].numpy(), chosen, 0.0), float(less.max())

    def parity(self, found: Answer, images: ImageBatch, text: TextBatch) -> Parity:
        """How far the graphs' answer is from this model's."""
        own, same_proposals = self.answer(images, text), self.answer_with(found.chosen, images, text)
        return compare(found, own, same_proposals, self.tolerance)


class Graphs:
    """ONNX files on the CPU, run one after another, with as many threads as torch has."""

    def __init__(self, files: Mapping[str, Form], folder: Path) -> None:
        self.forms = list(files.values())
        self._sessions = [_session(folder / file) for file in files]

    def answer(self, images: ImageBatch, text: TextBatch) -> Answer:
        """The graphs' answer; the second of two runs."""
        given = {name: tensor.numpy() for name, tensor in first_values(images.pixels, text).items()}
        self._run(given)
        started = time.perf_counter()
        found = self._run(given)
        seconds = time.perf_counter() - started
        scores = found.get("scores", found.get("logits"))
        assert scores is not None
        return Answer(scores[0], found["boxes"][0], found[CHOSEN].reshape(-1), seconds)

    def _run(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = dict(values)
        for form, session in zip(self.forms, self._sessions, strict=True):
            names = [output.name for output in session.get_outputs()]
            inputs = {name: values[name] for name in form.inputs}
            values |= zip(names, session.run(names, inputs), strict=True)
        return values


def _session(file: Path) -> Any:
    """The graph in onnxruntime; where it chooses proposals, with these as an output named CHOSEN."""
    import onnx
    import onnxruntime

    model = onnx.load(file)
    for node in model.graph.node:
        if node.op_type == "TopK":
            model.graph.node.append(onnx.helper.make_node("Identity", [node.output[1]], [CHOSEN]))
            model.graph.output.append(onnx.helper.make_tensor_value_info(CHOSEN, onnx.TensorProto.INT64, None))
    content = model.SerializeToString()
    del model
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; it warns of each float16 operator that the CPU computes in float32
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def compare(found: Answer, own: Answer, same_proposals: tuple[Answer, float], tolerance: float = TOLERANCE) -> Parity:
    """The graph's answer beside the model's with its own proposals, and with the graph's (`Model.answer_with`)."""
    expected, selection = same_proposals
    apart_scores, apart_boxes = _apart(found.scores, expected.scores), _apart(found.boxes, expected.boxes)
    return Parity(
        selection=selection,
        other_proposals=int((found.chosen != own.chosen).sum()),
        scores=float(apart_scores.max()),
        boxes=float(apart_boxes.max()),
        rows=len(apart_boxes),
        rows_apart=int((np.maximum(apart_scores, apart_boxes) > tolerance).sum()),
        same_detections=_found_again(found, own, tolerance),
        seconds=found.seconds,
        seconds_here=own.seconds,
        tolerance=tolerance,
    )


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(Q,) the largest difference in each row; equal infinities, at padded tokens, do not differ; NaN always does."""
    with np.errstate(invalid="ignore"):
        apart = np.where(a == b, 0.0, np.abs(a - b)).max(axis=1)
    return np.where(np.isnan(apart), np.inf, apart)


def _found_again(found: Answer, expected: Answer, tolerance: float) -> int:
    """How many of the BEST rows have an equal one, in whatever row."""
    best = np.argsort(-expected.scores.max(axis=1))[:BEST]
    rows = [
        np.maximum(
            np.abs(found.boxes - expected.boxes[row]).max(axis=1),
            _apart(found.scores, np.broadcast_to(expected.scores[row], found.scores.shape)),
        ).min()
        for row in best
    ]
    return int((np.array(rows) <= tolerance).sum())
