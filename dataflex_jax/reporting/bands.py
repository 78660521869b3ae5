"""Curves of runs over seeds as one curve with a band."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from dataflex_jax.reporting.plot_style import Band
from dataflex_jax.reporting.run_folder import RunRecords

# What is drawn as one curve: the runs of a recipe over seeds, or one run; by name.
Groups = Mapping[str, Sequence[RunRecords]]


def band(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> Band:
    """The mean of runs' curves with their lowest and highest, at the steps that all of them have.

    Args:
        curves: (steps, values) of each run; those without a point are left out, and one alone is its own mean.
    """
    curves = [curve for curve in curves if len(curve[0])]
    if len(curves) < 2:
        steps, values = curves[0] if curves else (np.zeros(0, np.int64), np.zeros(0))
        return Band(steps, values, values, values)
    steps = functools.reduce(np.intersect1d, (steps for steps, _ in curves))
    values = np.array([of_run[np.searchsorted(own_steps, steps)] for own_steps, of_run in curves])
    return Band(steps, values.mean(axis=0), values.min(axis=0), values.max(axis=0))
