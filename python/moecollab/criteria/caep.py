"""Contribution-Aware Expert Pruning: experts ranked by the patterns that need them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria.base import Criterion, Evidence, Needs
from moecollab.errors import MissingInputError

HEADROOM = 0.15
"""How far k₁ lies above the kept fraction 1 - drop."""
HIGHEST_THRESHOLD = 0.99


def threshold_fraction(drop: float) -> float:
    """k₁: the fraction of experts whose contribution reaches the fixed threshold."""
    # Rounded, so that k₁ n_sites is whole where it should be and not a hair above.
    return min(HIGHEST_THRESHOLD, round(1.0 - drop + HEADROOM, 12))


def caep(evidence: Evidence, /) -> NDArray[np.float64]:
    """Rank in which experts fall as the least used patterns are deleted one by one.

    Formula: contribution e = D r, with D the atoms of level 1 and r their usage; its threshold f is
        entry ⌈k₁ n_sites⌉ in descending order, fixed at the start; deleting the least used atom and
        recomputing e makes experts fall below f step by step; s = rank by (step, e, -site)
    Needs: routing, collaboration
    Direction: higher is kept
    Cost: O(n_atoms n_sites)
    Source: Algorithm 1 of Tang et al. 2025 (arXiv:2504.12359); differs: dead atoms (peak under
        0.05 of the largest) are deleted first, k₁ = min(0.99, 1 - drop + 0.15) as the paper gives
        none, and experts that fall in one step are ordered by e, which meets every budget exactly
    Not defined when: never; an expert that is in no pattern falls first
    """
    return _ranking(evidence, 0)


def caep_composed(evidence: Evidence, /) -> NDArray[np.float64]:
    """The ranking of ``caep`` by the finest patterns, with composed codes.

    Formula: as ``caep`` with the atoms D_m of the finest level m and the usage of its composed
        codes R_m … R_2 R_1, so that X ≈ D_m R_m … R_1; groups are smaller and there are more of
        them, so more steps decide
    Needs: routing, collaboration
    Direction: higher is kept
    Cost: O(n_atoms n_sites)
    Source: Algorithm 1 of Tang et al. 2025 (arXiv:2504.12359), which does not say which level it
        takes; differs as ``caep`` does
    Not defined when: never; an expert that is in no pattern falls first. With one level it is
        ``caep``
    """
    return _ranking(evidence, -1)


def _ranking(evidence: Evidence, number: int) -> NDArray[np.float64]:
    """Algorithm 1 on the patterns of one level."""
    from moecollab._core import caep_ranking

    if evidence.collaboration is None:
        raise MissingInputError("caep needs a collaboration; fit one on these activations")
    level = evidence.collaboration.levels[number]
    found = caep_ranking(
        np.ascontiguousarray(level.atoms, dtype=np.float32),
        np.ascontiguousarray(level.usage, dtype=np.float64),
        np.ascontiguousarray(level.peak, dtype=np.float64),
        threshold_fraction(evidence.drop),
    )
    return ranks(found["step"], found["contribution"]).reshape(evidence.shape)


def ranks(step: NDArray[np.int64], contribution: NDArray[np.float64]) -> NDArray[np.float64]:
    """Position of each site from first to fall (0) to last; the smaller site falls later.

    Parameters
    ----------
    step : int64 array of shape (n_sites,)
        Step at which each site falls.
    contribution : float64 array of shape (n_sites,)
        Its contribution, which orders sites that fall in one step.

    Examples
    --------
    >>> ranks(np.array([1, 0, 1]), np.array([0.5, 9.0, 0.2])).tolist()
    [2.0, 0.0, 1.0]
    """
    order = np.lexsort((-np.arange(len(step)), contribution, step))
    found = np.empty(len(step), dtype=np.float64)
    found[order] = np.arange(len(step))
    return found


_PATTERNS = Needs.ROUTING | Needs.COLLABORATION
CRITERIA = (
    Criterion("caep", _PATTERNS, caep, by_drop=True),
    Criterion("caep_composed", _PATTERNS, caep_composed, by_drop=True),
)
