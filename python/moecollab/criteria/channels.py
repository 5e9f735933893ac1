"""Criteria that read expert outputs channel by channel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria.base import Criterion, Evidence, Needs

SMALLEST = 1e-12
"""Least standard deviation of a channel whose logarithm is taken."""


def ean_channel(evidence: Evidence, /) -> NDArray[np.float64]:
    """Norm of each output channel over tokens, added up over channels.

    Formula: s(l, e) = Σ_c √(Σ_t f_c(t, l, e)²) over channels c and the tokens routed to e
    Needs: routing, channels
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts hidden)
    Source: EAN of MC-Suite, Jaiswal et al. 2025 (arXiv:2504.05586), its best criterion; the norm is
        along tokens, so it differs from ``ean_sum``
    Not defined when: never; an expert without tokens scores 0
    """
    norms: NDArray[np.float64] = np.sqrt(evidence.tallies["sum_output_sq"]).sum(axis=-1)
    return norms


def mean_output_norm(evidence: Evidence, /) -> NDArray[np.float64]:
    """Norm of each expert's mean output: outputs that point the same way count.

    Formula: s(l, e) = ‖Σ_t f(t, l, e)‖₂ / n(l, e) over the n tokens routed to e
    Needs: routing, channels
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts hidden)
    Source: EAN-CA of the REAP code (arXiv:2510.13999)
    Not defined when: an expert has no tokens; it scores 0
    """
    norm: NDArray[np.float64] = np.linalg.norm(evidence.tallies["sum_output"], axis=-1)
    return norm / np.maximum(evidence.tallies.count, 1)


def eae(evidence: Evidence, /) -> NDArray[np.float64]:
    """Logarithms of the spread of each output channel over tokens, added up.

    Formula: s(l, e) = Σ_c log σ_c(l, e), σ_c the standard deviation of f_c over the n tokens routed
        to e, with n in the denominator, and at least 1e-12
    Needs: routing, channels
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts hidden)
    Source: EAE of MC-Suite, Jaiswal et al. 2025 (arXiv:2504.05586), which tries both directions;
        the smallest goes first, as is best for the same of gradients there
    Not defined when: an expert has fewer than two tokens; every channel counts log 1e-12
    """
    spread = np.sqrt(_squares(evidence) / np.maximum(evidence.tallies.count, 1)[..., None])
    total: NDArray[np.float64] = np.log(np.maximum(spread, SMALLEST)).sum(axis=-1)
    return total


def mone(evidence: Evidence, /) -> NDArray[np.float64]:
    """Total weight of each expert times the spread of its outputs around their mean.

    Formula: s(l, e) = Σ_t g(t, l, e) √(Σ_c v_c(l, e)), v_c the variance of f_c over the n tokens
        routed to e, with n - 1 in the denominator
    Needs: routing, routing weights, channels
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts hidden)
    Source: MoNE, Zhang et al. 2025 (arXiv:2507.00390), the fusion of the authors' code without its
        constant factors; differs: only the score, a dropped expert is not replaced by its mean
    Not defined when: an expert has fewer than two tokens; it scores 0
    """
    variance = _squares(evidence).sum(axis=-1) / np.maximum(evidence.tallies.count - 1, 1)
    spread: NDArray[np.float64] = np.sqrt(variance)
    return evidence.tallies.sum_weight * spread


def _squares(evidence: Evidence) -> NDArray[np.float64]:
    """Σ_t (f_c - mean)² of every channel, ≥ 0: float64 (n_layers, n_experts, hidden)."""
    total, squares = evidence.tallies["sum_output"], evidence.tallies["sum_output_sq"]
    count = evidence.tallies.count[..., None]
    around: NDArray[np.float64] = squares - total * total / np.maximum(count, 1)
    # What is left of equal numbers after subtraction is the sums' rounding, of either sign.
    noise = (count + 4) * np.finfo(np.float64).eps * squares
    around[around <= noise] = 0
    return around


_CHANNELS = Needs.ROUTING | Needs.CHANNELS
CRITERIA = (
    Criterion("ean_channel", _CHANNELS, ean_channel),
    Criterion("mean_output_norm", _CHANNELS, mean_output_norm),
    Criterion("eae", _CHANNELS, eae),
    Criterion("mone", _CHANNELS | Needs.ROUTING_WEIGHTS, mone),
)
