"""Figures in columns."""

from groundingdino.evaluation.report import mixture_table


def test_a_column_is_wide_enough_for_the_name_above_it():
    names = ["AP", "precision@10", "full AP, 4-8 words"]
    header, row = mixture_table({0.5: {names[0]: 0.25, names[1]: None, names[2]: 1.0}}, names)
    assert header == "alpha".rjust(6) + "".join(name.rjust(20) for name in names)
    assert row.split() == ["0.5", "25.00", "-", "100.00"] and len(row) == len(header)
