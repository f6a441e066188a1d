"""A mean and how sure we are of it."""

from collections.abc import Sequence

import numpy as np

_RESAMPLES = 2000


def mean_with_interval(values: Sequence[float], seed: int = 0) -> tuple[float, list[float]]:
    """Mean and its 95% percentile-bootstrap interval over prompts.

    Args:
        values: one figure a prompt, at least one; several samples of a prompt are averaged before, since they are
            not independent.
        seed: of the resampling.

    Returns:
        The mean, and [low, high].
    """
    data = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(data), size=(_RESAMPLES, len(data)))
    low, high = np.percentile(data[picks].mean(axis=1), [2.5, 97.5])
    return float(data.mean()), [float(low), float(high)]
