"""Criteria that read the router alone, and the random control."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria.base import Criterion, Evidence, Needs


def frequency(evidence: Evidence, /) -> NDArray[np.float64]:
    """Number of tokens that the router sent to each expert.

    Formula: s(l, e) = n(l, e), the number of tokens routed to expert e of layer l
    Needs: routing
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts)
    Source: He et al. 2024 (arXiv:2406.02500); hard counts of SEER-MoE (arXiv:2404.05089)
    Not defined when: never; an expert without tokens scores 0
    """
    return evidence.tallies.count.astype(np.float64)


def gate_sum(evidence: Evidence, /) -> NDArray[np.float64]:
    """Total weight with which the model used each expert.

    Formula: s(l, e) = Σ_t g(t, l, e) over the tokens routed to e, g the weight the model used
    Needs: routing
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts)
    Source: SEER-MoE (arXiv:2404.05089), He et al. 2024 (arXiv:2406.02500), for DeepSeek as coded
        there; differs: they average over samples first, which weights short samples more
    Not defined when: never; an expert without tokens scores 0
    """
    return evidence.tallies.sum_weight.astype(np.float64)


def random(evidence: Evidence, /) -> NDArray[np.float64]:
    """Independent uniform numbers: the control that every criterion must beat.

    Formula: s(l, e) ~ U[0, 1), drawn layer by layer from the seed
    Needs: nothing
    Direction: higher is kept
    Cost: one draw per expert
    Source: the random row of every pruning table
    Not defined when: never
    """
    return np.random.default_rng(evidence.seed).random(evidence.shape)


CRITERIA = (
    Criterion("frequency", Needs.ROUTING, frequency),
    Criterion("gate_sum", Needs.ROUTING, gate_sum),
    Criterion("random", Needs.NOTHING, random),
)
