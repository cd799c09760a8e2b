"""Weights of other code bases: readers that run no pickled code, and key tables {theirs: ours}."""
