"""Evaluation between epochs."""

import dataclasses
from pathlib import Path

from training_runs import SMALL, small_config

from groundingdino.model import build_detector
from groundingdino.training.validation import Assessor


def test_pictures_are_of_the_first_of_several_splits(data: Path, tmp_path: Path) -> None:
    config = small_config(data, tmp_path, pictures=2)
    ((_, file),) = config.data.evaluation
    both = dataclasses.replace(config.data, evaluation=(("first", file), ("second", file)))
    model = build_detector(SMALL).eval()
    for sources in (config.data, both):
        assessor = Assessor(dataclasses.replace(config, data=sources))
        assessment = assessor.assess(model)
        assert len(assessment.figures) == len(sources.evaluation)
        assert len(assessor.pictures(assessment)) == 2
