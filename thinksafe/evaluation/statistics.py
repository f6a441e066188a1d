"""A mean and how sure we are of it."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

_RESAMPLES = 2000
_Z = NormalDist().inv_cdf(0.975)


def mean_with_interval(values: Sequence[float], seed: int = 0) -> tuple[float, list[float]]:
    """Mean and its 95% interval over prompts: Wilson's for yes and no, else the percentile bootstrap.

    Resampling 0 of n gives 0 again and again, and so would call [0, 0] certain; Wilson's interval is honest there.
    It also stands in where all values are the same share: of all figures in [0, 1], yes and no vary most.

    Args:
        values: one figure in [0, 1] a prompt, at least one; several samples of a prompt are averaged before, since
            they are not independent.
        seed: of the resampling.

    Returns:
        The mean, and [low, high].
    """
    data = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    if np.isin(data, (0.0, 1.0)).all() or (data == data[0]).all():
        return mean, _wilson(mean, len(data))
    picks = np.random.default_rng(seed).integers(len(data), size=(_RESAMPLES, len(data)))
    return mean, np.percentile(data[picks].mean(axis=1), [2.5, 97.5]).tolist()


def _wilson(share: float, count: int) -> list[float]:
    """Every p from which `share` of `count` is no more than 1.96 standard errors away (Wilson 1927)."""
    shrink = 1 + _Z**2 / count
    centre = (share + _Z**2 / (2 * count)) / shrink
    reach = _Z / shrink * (share * (1 - share) / count + (_Z / (2 * count)) ** 2) ** 0.5
    return [max(0.0, centre - reach), min(1.0, centre + reach)]
