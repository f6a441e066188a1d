"""Combinations of test parameters: some of them run in `make test`, all of them in `make test-all`."""

from collections.abc import Iterable
from itertools import combinations as subsets
from itertools import product

import pytest


def combinations(*axes: Iterable, together: int = 1) -> list:
    """Return every combination of the axes' values, as parameters of a test.

    The fewest combinations that a greedy search finds run in `make test`; all others are marked `exhaustive`.

    Args:
        together: 1 if every value must occur in `make test`, 2 if every pair of values of two axes must, and so on.
    """
    axes = [list(axis) for axis in axes]
    all_indices = list(product(*(range(len(axis)) for axis in axes)))
    selected, missing = set(), {subset for indices in all_indices for subset in _subsets(indices, together)}
    while missing:
        best = max(all_indices, key=lambda indices: len(missing & _subsets(indices, together)))
        selected.add(best)
        missing -= _subsets(best, together)
    parameters = []
    for indices in all_indices:
        values = [axis[index] for axis, index in zip(axes, indices, strict=True)]
        marks = () if indices in selected else pytest.mark.exhaustive
        parameters.append(pytest.param(*values, marks=marks, id=", ".join(map(str, values))))
    return parameters


def _subsets(indices: tuple[int, ...], size: int) -> set:
    """Return the subsets of `size` axes, each with the axes' indices."""
    return set(subsets(enumerate(indices), size))
