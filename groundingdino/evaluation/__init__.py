"""How good a model is, by the protocols of the field: one file a protocol, one runner for all.

    protocol = ReferringProtocol(data.load_expressions(json_file), image_folder, scoring="max")
    evaluation = evaluate_referring(model, protocol, EvaluationOptions(precision="bf16"))
    evaluation.figures.precision["refcoco"][1], evaluation.figures.average_precision

Works in one process and under torchrun, where every rank gets the result of all. `runner` says what a protocol is.
"""

from groundingdino.evaluation.answers import ImageAnswer
from groundingdino.evaluation.metrics import average_precision, precision
from groundingdino.evaluation.referring import ReferringFigures, ReferringProtocol, evaluate_referring
from groundingdino.evaluation.runner import Evaluation, EvaluationOptions, EvaluationProtocol, Question, evaluate

__all__ = [
    "Evaluation",
    "EvaluationOptions",
    "EvaluationProtocol",
    "ImageAnswer",
    "Question",
    "ReferringFigures",
    "ReferringProtocol",
    "average_precision",
    "evaluate",
    "evaluate_referring",
    "precision",
]
