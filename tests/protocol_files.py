"""Golden files of the evaluation protocols: annotations, predictions, and what the reference computed."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from groundingdino.evaluation.answers import ImageAnswer

FOLDER = Path(__file__).parent / "golden" / "protocols"


def load(protocol: str, name: str) -> Any:
    return json.loads((FOLDER / protocol / name).read_text())


def answers(protocol: str) -> list[ImageAnswer]:
    return [
        ImageAnswer(
            row["image_id"],
            np.array(row["boxes"], dtype=np.float64).reshape(-1, 4),
            np.array(row["scores"], dtype=np.float64),
            np.array(row.get("labels", [0] * len(row["scores"])), dtype=np.int64),
        )
        for row in load(protocol, "predictions.json")
    ]
