"""The mean of a benchmark's values, with its confidence interval."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

_NUM_RESAMPLES = 2000
_Z = NormalDist().inv_cdf(0.975)


def mean_with_interval(values: Sequence[float]) -> tuple[float, list[float]]:
    """Return the mean over prompts and its 95% confidence interval [low, high].

    The interval is Wilson's if all values are 0 or 1 or all are equal, else the percentile bootstrap with 2000
    resamples. The bootstrap of n equal values has width 0, which would claim certainty; Wilson's interval does not, and
    it is wide enough for any values, because values of 0 and 1 vary most for a given mean.

    Args:
        values: one figure in [0, 1] for each prompt, at least one; several samples of a prompt are averaged before,
            because they are not independent.
    """
    data = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    if np.isin(data, (0.0, 1.0)).all() or (data == data[0]).all():
        return mean, _wilson(mean, len(data))
    indices = np.random.default_rng(0).integers(len(data), size=(_NUM_RESAMPLES, len(data)))
    return mean, np.percentile(data[indices].mean(axis=1), [2.5, 97.5]).tolist()


def _wilson(share: float, count: int) -> list[float]:
    """Return [low, high]: all p with |share - p| <= 1.96 * sqrt(p * (1 - p) / count) (Wilson 1927)."""
    denominator = 1 + _Z**2 / count
    center = (share + _Z**2 / (2 * count)) / denominator
    half_width = _Z / denominator * (share * (1 - share) / count + (_Z / (2 * count)) ** 2) ** 0.5
    return [max(0.0, center - half_width), min(1.0, center + half_width)]
