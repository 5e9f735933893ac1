"""Criteria that read how much the experts put out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria.base import Criterion, Evidence, Needs


def reap(evidence: Evidence, /) -> NDArray[np.float64]:
    """Mean size of what each expert adds to a token that is routed to it.

    Formula: s(l, e) = Σ_t g(t, l, e) ‖f(t, l, e)‖₂ / n(l, e) over the n tokens routed to e,
        f the expert's output before its weight g
    Needs: routing, output norms
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts)
    Source: REAP, Lasby et al. 2025 (arXiv:2510.13999), eq. 9; g is the weight the model used
    Not defined when: an expert has no tokens; it scores 0
    """
    total: NDArray[np.float64] = evidence.tallies["sum_weighted_norm"]
    count = evidence.tallies.count
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)


CRITERIA = (Criterion("reap", Needs.ROUTING | Needs.OUTPUT_NORMS, reap),)
