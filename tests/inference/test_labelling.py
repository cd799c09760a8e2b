"""Options of labelling; what labelling does is tested in tests/cli/test_label.py."""

import pytest

from groundingdino.inference.labelling import Choice, LabelOptions


def test_the_ends_of_each_range_are_taken_and_what_is_beyond_is_refused():
    LabelOptions(batch_size=1, keep_above=0.0)
    Choice(threshold=0.0, nms=1.0, min_size=0.0, top_k=1)
    for wrong in ({"batch_size": 0}, {"keep_above": 1.0}, {"keep_above": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LabelOptions(**wrong)
    with pytest.raises(ValueError, match=r"min_size -0\.5"):
        Choice(min_size=-0.5)
