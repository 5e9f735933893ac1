"""Criteria that read how much the experts put out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria.base import Criterion, Evidence, Needs
from moecollab.criteria.routing import per_token
from moecollab.errors import MissingInputError


def reap(evidence: Evidence, /) -> NDArray[np.float64]:
    """Mean size of what each expert adds to a token that is routed to it.

    Formula: s(l, e) = Σ_t g(t, l, e) ‖f(t, l, e)‖₂ / n(l, e) over the n tokens routed to e,
        f the expert's output before its weight g
    Needs: routing, output norms
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts)
    Source: REAP, Lasby et al. 2025 (arXiv:2510.13999), eq. 9; g is the weight the model used, as in
        the authors' code since 2026-03. Minitron's expert importance is the same
    Not defined when: an expert has no tokens; it scores 0
    """
    return per_token(evidence.tallies["sum_weighted_norm"], evidence)


def reap_sum(evidence: Evidence, /) -> NDArray[np.float64]:
    """Total size of what each expert adds to the tokens that are routed to it.

    Formula: s(l, e) = Σ_t g(t, l, e) ‖f(t, l, e)‖₂ over the tokens routed to e
    Needs: routing, output norms
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts)
    Source: weighted EAN sum of the REAP code (arXiv:2510.13999); some tools call this sum REAP. It
        is EASY-EP without the token term
    Not defined when: never; an expert without tokens scores 0
    """
    return evidence.tallies["sum_weighted_norm"].astype(np.float64)


def ean_sum(evidence: Evidence, /) -> NDArray[np.float64]:
    """Total norm of each expert's outputs.

    Formula: s(l, e) = Σ_t ‖f(t, l, e)‖₂ over the tokens routed to e, f before its weight
    Needs: routing, output norms
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts)
    Source: EAN as in the REAP code (arXiv:2510.13999); that of MC-Suite is ``ean_channel``
    Not defined when: never; an expert without tokens scores 0
    """
    return evidence.tallies["sum_norm"].astype(np.float64)


def ean_mean(evidence: Evidence, /) -> NDArray[np.float64]:
    """Mean norm of each expert's outputs over the tokens routed to it.

    Formula: s(l, e) = Σ_t ‖f(t, l, e)‖₂ / n(l, e) over the n tokens routed to e
    Needs: routing, output norms
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts)
    Source: MAN, Liu et al. 2026 (arXiv:2606.15716); EAN mean of the REAP code
    Not defined when: an expert has no tokens; it scores 0
    """
    return per_token(evidence.tallies["sum_norm"], evidence)


def msan(evidence: Evidence, /) -> NDArray[np.float64]:
    """Mean squared norm of each expert's outputs over the tokens routed to it.

    Formula: s(l, e) = Σ_t ‖f(t, l, e)‖₂² / n(l, e) over the n tokens routed to e
    Needs: routing, output norms
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts)
    Source: MSAN, Liu et al. 2026 (arXiv:2606.15716)
    Not defined when: an expert has no tokens; it scores 0
    """
    return per_token(evidence.tallies["sum_norm_sq"], evidence)


def max_activation(evidence: Evidence, /) -> NDArray[np.float64]:
    """Largest magnitude in any of each expert's outputs.

    Formula: s(l, e) = max over tokens routed to e and channels c of |f_c(t, l, e)|
    Needs: routing, output norms
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts)
    Source: max activations of the REAP code (arXiv:2510.13999), which takes the largest signed
        entry; differs: magnitudes, as in Super Experts
    Not defined when: an expert has no tokens; it scores 0
    """
    return evidence.tallies["max_abs"].astype(np.float64)


def easy_ep(evidence: Evidence, /) -> NDArray[np.float64]:
    """Total size of what each expert adds, counted where experts turn the stream.

    Formula: s(l, e) = Σ_t g(t, l, e) ‖f(t, l, e)‖₂ max(0, 1 - cos(h(t), h(t) + y(t))), h the
        residual stream before the layer's experts and y the weighted sum of the routed ones
    Needs: routing, shift
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts)
    Source: EASY-EP, Dong et al. 2025 (arXiv:2504.06792), for one domain; with several, the paper
        blends them as ``easy_ep_mixed`` does, this adds them up
    Not defined when: never; an expert without tokens scores 0
    """
    return evidence.tallies["sum_shift"].astype(np.float64)


def easy_ep_mixed(evidence: Evidence, /) -> NDArray[np.float64]:
    """Mean over domains of each expert's share of its layer's EASY-EP score.

    Formula: s(l, e) = Σ_d s_d(l, e) / Σ_e' s_d(l, e') / n_domains, s_d the score ``easy_ep`` of
        domain d
    Needs: routing, shift, domains
    Direction: higher is kept
    Cost: reads the tallies, O(n_domains n_layers n_experts)
    Source: EASY-EP for mixed domains, Dong et al. 2025 (arXiv:2504.06792). With one domain ranks a
        layer's experts as ``easy_ep`` does
    Not defined when: a domain has no shift in a layer; it adds 0 there
    """
    if evidence.by_domain is None:
        raise MissingInputError(
            "easy_ep_mixed needs sums by domain, which this evidence lacks; use easy_ep, or score "
            "a recording"
        )
    shift = evidence.by_domain["sum_shift"]
    total = shift.sum(axis=-1, keepdims=True)
    share: NDArray[np.float64] = np.zeros(shift.shape)
    np.divide(shift, total, out=share, where=total > 0)
    mean: NDArray[np.float64] = share.mean(axis=0)
    return mean


_NORMS = Needs.ROUTING | Needs.OUTPUT_NORMS
_SHIFT = Needs.ROUTING | Needs.SHIFT
CRITERIA = (
    Criterion("reap", _NORMS, reap),
    Criterion("reap_sum", _NORMS, reap_sum),
    Criterion("ean_sum", _NORMS, ean_sum),
    Criterion("ean_mean", _NORMS, ean_mean),
    Criterion("msan", _NORMS, msan),
    Criterion("max_activation", _NORMS, max_activation),
    Criterion("easy_ep", _SHIFT, easy_ep),
    Criterion("easy_ep_mixed", _SHIFT | Needs.DOMAINS, easy_ep_mixed),
)
