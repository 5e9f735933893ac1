"""Criteria that read expert outputs channel by channel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria.base import Criterion, Evidence, Needs

_EPSILON = float(np.finfo(np.float64).eps)
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
    squares = evidence.tallies["sum_output_sq"]
    return np.stack([np.sqrt(layer).sum(axis=-1) for layer in squares])


def mean_output_norm(evidence: Evidence, /) -> NDArray[np.float64]:
    """Norm of each expert's mean output: outputs that point the same way count.

    Formula: s(l, e) = ‖Σ_t f(t, l, e)‖₂ / n(l, e) over the n tokens routed to e
    Needs: routing, channels
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts hidden)
    Source: EAN-CA of the REAP code (arXiv:2510.13999)
    Not defined when: an expert has no tokens; it scores 0
    """
    norm: NDArray[np.float64] = np.sqrt(_lengths(evidence))
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
    sums, squares = evidence.tallies["sum_output"], evidence.tallies["sum_output_sq"]
    layers = zip(sums, squares, evidence.tallies.count, strict=True)
    # One expert at a time stays in the processor's cache.
    found = [[_log_spread(*one) for one in zip(*layer, strict=True)] for layer in layers]
    return np.array(found, np.float64)


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
    count, squares = evidence.tallies.count, evidence.tallies["sum_output_sq"].sum(axis=-1)
    variance = _around(_lengths(evidence), squares, count) / np.maximum(count - 1, 1)
    return evidence.tallies.sum_weight * np.sqrt(variance)


def _lengths(evidence: Evidence) -> NDArray[np.float64]:
    """‖Σ_t f‖² of every expert: float64 (n_layers, n_experts)."""
    total = evidence.tallies["sum_output"]
    lengths: NDArray[np.float64] = np.einsum("lec,lec->le", total, total)
    return lengths


def _log_spread(
    total: NDArray[np.float64], squares: NDArray[np.float64], count: np.int64
) -> np.float64:
    """Σ_c log σ_c of one expert from sums of shape (hidden,)."""
    n = np.maximum(count, 1)
    around = _around(total * total, squares, count)
    np.maximum(around, SMALLEST**2 * n, out=around)
    return np.float64((np.log(around, out=around).sum() - len(around) * np.log(n)) / 2)


def _around(
    total_sq: NDArray[np.float64], squares: NDArray[np.float64], count: NDArray[np.int64] | np.int64
) -> NDArray[np.float64]:
    """Σ_t (f - mean)², ≥ 0, from (Σ_t f)², which is overwritten, and Σ_t f²."""
    total_sq /= np.maximum(count, 1)
    np.subtract(squares, total_sq, out=total_sq)
    # What is left of equal numbers after subtraction is the sums' rounding, of either sign.
    np.copyto(total_sq, 0, where=total_sq <= (count + 4) * _EPSILON * squares)
    return total_sq


_CHANNELS = Needs.ROUTING | Needs.CHANNELS
CRITERIA = (
    Criterion("ean_channel", _CHANNELS, ean_channel),
    Criterion("mean_output_norm", _CHANNELS, mean_output_norm),
    Criterion("eae", _CHANNELS, eae),
    Criterion("mone", _CHANNELS | Needs.ROUTING_WEIGHTS, mone),
)
