"""Bootstrap intervals over documents: how sure a loss, or a difference of losses, is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1_000
CONFIDENCE = 0.95
_CHUNK = 1 << 21
"""Drawn indices held at a time, so that memory does not grow with the number of documents."""


class Interval(NamedTuple):
    """Ends of a percentile interval."""

    low: float
    high: float


def resampled_sums(
    columns: NDArray[np.float64], *, seed: int, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """Column sums over documents drawn with replacement, as many as there are.

    The draws depend on the seed and the number of documents only, so that quantities measured on
    the same documents are resampled together.

    Parameters
    ----------
    columns : float64 array of shape (n_documents, n_columns)
        What to add up.
    seed : int
        Seed of the draws.
    resamples : int
        Number of draws.

    Returns
    -------
    float64 array of shape (resamples, n_columns)
    """
    n_documents = len(columns)
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // n_documents)
    sums = np.empty((resamples, columns.shape[1]), dtype=np.float64)
    for start in range(0, resamples, step):
        size = (min(step, resamples - start), n_documents)
        drawn = rng.integers(0, n_documents, size)
        for column in range(columns.shape[1]):
            sums[start : start + size[0], column] = columns[drawn, column].sum(axis=1)
    return sums


def percentiles(draws: NDArray[np.float64], confidence: float = CONFIDENCE) -> Interval:
    """The interval that holds the middle `confidence` of the draws."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(low), float(high))


def ratio_interval(
    total: NDArray[np.float64], size: NDArray[np.float64], *, seed: int
) -> Interval | None:
    """Interval of ``sum(total) / sum(size)``; None for fewer than two documents.

    Parameters
    ----------
    total : float64 array of shape (n_documents,)
        Loss of each document, say.
    size : float64 array of shape (n_documents,)
        Its number of tokens, > 0; one for a plain mean.
    seed : int
        Seed of the resampling.
    """
    if len(total) < 2:
        return None
    sums = resampled_sums(np.column_stack((total, size)), seed=seed)
    return percentiles(sums[:, 0] / sums[:, 1])


def paired_interval(
    total: NDArray[np.float64],
    baseline: NDArray[np.float64],
    size: NDArray[np.float64],
    *,
    seed: int,
) -> Interval | None:
    """Interval of ``sum(total - baseline) / sum(size)`` on the same documents.

    Differences within a document cancel what makes it easy or hard, so this is much narrower than
    two intervals side by side.
    """
    return ratio_interval(total - baseline, size, seed=seed)
