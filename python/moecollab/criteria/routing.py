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
    Needs: routing, routing weights
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts)
    Source: SEER-MoE (arXiv:2404.05089), He et al. 2024 (arXiv:2406.02500), for DeepSeek as coded
        there; differs: they average over samples first, which weights short samples more
    Not defined when: never; an expert without tokens scores 0
    """
    return evidence.tallies.sum_weight.astype(np.float64)


def gate_mean(evidence: Evidence, /) -> NDArray[np.float64]:
    """Mean weight of each expert over the tokens that are routed to it.

    Formula: s(l, e) = Σ_t g(t, l, e) / n(l, e) over the n tokens routed to e
    Needs: routing, routing weights
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts)
    Source: the family of Liu et al. 2026 (arXiv:2606.15716) with the gate alone, averaged over
        routed tokens; as the mean router weight in pruners for ONNX
    Not defined when: an expert has no tokens; it scores 0
    """
    return per_token(evidence.tallies.sum_weight, evidence)


def soft_routing(evidence: Evidence, /) -> NDArray[np.float64]:
    """Total router probability of each expert over all tokens, routed to it or not.

    Formula: s(l, e) = Σ_t p(t, l, e) over all tokens, p the router's probability before top-k
    Needs: probability
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts)
    Source: soft counts of SEER-MoE, Muzio et al. 2024 (arXiv:2404.05089); He et al. 2024
        (arXiv:2406.02500) for Mixtral as coded there
    Not defined when: never
    """
    return evidence.tallies["sum_probability"].astype(np.float64)


def esft_token(evidence: Evidence, /) -> NDArray[np.float64]:
    """Share of a layer's routing that goes to each expert, by number of choices.

    Formula: s(l, e) = n(l, e) / Σ_e' n(l, e'), which is n(l, e) / (k T) for T tokens with k experts
    Needs: routing
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts)
    Source: ESFT-Token, Wang et al. 2024 (arXiv:2407.01906), eq. 8; differs: over all tokens, as the
        authors' published scores are, where the paper averages over samples first. Ranks a layer's
        experts as ``frequency`` does
    Not defined when: a layer has no tokens; its experts score 0
    """
    return _per_choice(evidence, evidence.tallies.count.astype(np.float64))


def esft_gate(evidence: Evidence, /) -> NDArray[np.float64]:
    """Mean weight of each expert over all tokens.

    Formula: s(l, e) = Σ_t g(t, l, e) / T, with T = Σ_e n(l, e) / k tokens of k experts each
    Needs: routing, routing weights
    Direction: higher is kept
    Cost: reads the tallies, O(n_layers n_experts)
    Source: ESFT-Gate, Wang et al. 2024 (arXiv:2407.01906), eq. 7; differs: over all tokens, as the
        authors' published scores are, where the paper averages over samples first. Ranks a layer's
        experts as ``gate_sum`` does
    Not defined when: a layer has no tokens; its experts score 0
    """
    return _per_choice(evidence, evidence.top_k * evidence.tallies.sum_weight.astype(np.float64))


def _per_choice(evidence: Evidence, total: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums divided by the number of choices in their layer."""
    choices = evidence.tallies.count.sum(axis=-1, keepdims=True)
    share: NDArray[np.float64] = np.zeros(total.shape)
    np.divide(total, choices, out=share, where=choices > 0)
    return share


def per_token(total: NDArray[np.float64], evidence: Evidence) -> NDArray[np.float64]:
    """Sums divided by the number of tokens routed to each expert, 0 where there are none."""
    mean: NDArray[np.float64] = np.zeros(total.shape)
    count = evidence.tallies.count
    return np.divide(total, count, out=mean, where=count > 0)


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
    Criterion("gate_sum", Needs.ROUTING | Needs.ROUTING_WEIGHTS, gate_sum),
    Criterion("gate_mean", Needs.ROUTING | Needs.ROUTING_WEIGHTS, gate_mean),
    Criterion("soft_routing", Needs.PROBABILITY, soft_routing),
    Criterion("esft_token", Needs.ROUTING, esft_token),
    Criterion("esft_gate", Needs.ROUTING | Needs.ROUTING_WEIGHTS, esft_gate),
    Criterion("random", Needs.NOTHING, random),
)
