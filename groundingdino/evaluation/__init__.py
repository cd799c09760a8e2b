"""How good a model is at referring expressions.

    expressions = data.load_expressions(json_file)
    result = evaluate_referring(model, expressions, image_folder, EvaluationOptions(scoring="max"))
    result.precision["refcoco"][1], result.average_precision, result.report()

Works in one process and under torchrun, where every rank gets the result of all.
"""

from groundingdino.evaluation.metrics import Answer, average_precision, precision
from groundingdino.evaluation.published import published
from groundingdino.evaluation.referring import (
    Evaluation,
    EvaluationOptions,
    Photograph,
    evaluate_referring,
    group_by_photograph,
    share,
)

__all__ = [
    "Answer",
    "Evaluation",
    "EvaluationOptions",
    "Photograph",
    "average_precision",
    "evaluate_referring",
    "group_by_photograph",
    "precision",
    "published",
    "share",
]
