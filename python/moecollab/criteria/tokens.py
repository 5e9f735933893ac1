"""Criteria that read what every single token did."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria.base import Criterion, Evidence, Needs
from moecollab.criteria.pairs import rank_by_fall
from moecollab.errors import MissingInputError
from moecollab.record.activations import Activations, LayerTable
from moecollab.record.schema import NO_EXPERT


def shapley(evidence: Evidence, /) -> NDArray[np.float64]:
    """What each expert adds to the coalitions that tokens were routed to.

    Formula: s(l, e) = Σ_{A ∋ e} (v(A) - α_e m(A - e)) over the sets A of experts that served some
        token, v(A) the number of tokens it served, m(B) the number served by B and any one expert
        more, and α_e = min_{A ∋ e} v(A) / m(A - e)
    Needs: routing, tokens
    Direction: higher is kept
    Cost: O(n_layers n_tokens top_k log n_tokens)
    Source: SHAPE (arXiv:2606.09886) as in the authors' code; differs: without the factor
        (k - 1)! (E - k)! / E!, which is the same for all experts. Sets are told apart by 64-bit
        keys, which fails once in 10⁵ recordings of a million sets
    Not defined when: an expert has no tokens; it scores 0
    """
    acts = _tokens(evidence)
    draws = np.random.default_rng(0).integers(0, 2**64, acts.n_experts + 1, np.uint64)
    draws[-1] = 0  # a slot that was not used
    return np.stack([_values(acts.layer(layer), draws) for layer in acts.layers])


def _values(table: LayerTable, draws: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Values of one layer's experts; a set's key is the sum of its members' draws."""
    n_experts = len(draws) - 1
    expert = np.where(table.weight != 0, table.expert, n_experts)
    keys, which, count = np.unique(
        draws[expert].sum(axis=1, dtype=np.uint64), return_index=True, return_counts=True
    )
    members = expert[which]  # (n_sets, top_k)
    without = keys[:, None] - draws[members]
    used = members < n_experts
    served = np.broadcast_to(count[:, None], members.shape)[used].astype(np.float64)
    _, rest = np.unique(without[used], return_inverse=True)
    around = np.bincount(rest, served)[rest]
    expert_of = members[used]
    least = np.full(n_experts, np.inf)
    np.minimum.at(least, expert_of, served / around)
    added: NDArray[np.float64] = served - least[expert_of] * around
    return np.bincount(expert_of, added, n_experts).astype(np.float64)


def ranked_choice(evidence: Evidence, /) -> NDArray[np.float64]:
    """Rank of falling when the least used goes and its tokens choose again.

    Formula: count for every expert the tokens that have it among their k best experts left, drop
        that with the fewest, and repeat; s = rank in this order
    Needs: preferences, tokens
    Direction: higher is kept
    Cost: O(n_layers (n_tokens top_k + n_experts²))
    Source: ranked-choice voting of NVIDIA's Model Optimizer (Puzzletron), which ranks all experts
        for every token; differs: the 2k best beyond the chosen are recorded, and a token that has
        used them up votes for fewer. An expert that nobody chooses falls first, ties go to the
        larger id
    Not defined when: never; an expert without tokens falls first
    """
    acts = _tokens(evidence)
    layers = zip(acts.layers, evidence.counts, strict=True)
    return evidence.stacked(_election(acts.layer(layer), count) for layer, count in layers)


def _election(table: LayerTable, n_experts: int) -> NDArray[np.float64]:
    """Ranks of one layer's experts."""
    from moecollab._core import ranked_choice_falls

    gone = ranked_choice_falls(_ballots(table), table.expert.shape[1], n_experts)
    return rank_by_fall(gone.tolist(), n_experts)


def _ballots(table: LayerTable) -> NDArray[np.uint16]:
    """The experts of every token, best first; no expert where a slot was not used."""
    if table.next is None:
        raise MissingInputError('no preferences were recorded; extract with collect="preferences"')
    used = np.where(table.weight != 0, table.expert, NO_EXPERT)
    return np.concatenate([used, table.next], axis=1).astype(np.uint16)


def _tokens(evidence: Evidence) -> Activations:
    if evidence.activations is None:
        raise MissingInputError("single tokens are needed; pass activations that hold them")
    return evidence.activations


CRITERIA = (
    Criterion("shapley", Needs.ROUTING | Needs.TOKENS, shapley),
    Criterion("ranked_choice", Needs.PREFERENCES | Needs.TOKENS, ranked_choice),
)
