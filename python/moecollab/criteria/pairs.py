"""Criteria that compare experts with each other: pairs of a layer, and the words they see."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moecollab.criteria.base import Criterion, Evidence, Needs
from moecollab.record.sketch import distinct, shared_by_all

PAIRS = 512
"""Pairs that are looked at before those of experts that fell are taken out again."""


def evtc(evidence: Evidence, /) -> NDArray[np.float64]:
    """About how many different token ids were routed to each expert.

    Formula: s(l, e) = number of different ids among the tokens routed to e, estimated from a sketch
        with a standard error of 3.3 %
    Needs: routing, vocabulary
    Direction: higher is kept
    Cost: reads the tallies, O(1024 n_layers n_experts)
    Source: EVTC of MC-Suite, Jaiswal et al. 2025 (arXiv:2504.05586), which divides by the
        vocabulary's size
    Not defined when: never; an expert without tokens scores 0
    """
    return distinct(evidence.tallies["token_sketch"])


def ecc(evidence: Evidence, /) -> NDArray[np.float64]:
    """Rank of falling, the less used of the pair most often chosen together first.

    Formula: of all pairs of a layer whose members are left, take that with the most common tokens
        and drop its member with fewer tokens, until one is left; s = rank in this order
    Needs: routing, pairs
    Direction: higher is kept
    Cost: O(n_layers n_experts² log n_experts)
    Source: ECC of MC-Suite, Jaiswal et al. 2025 (arXiv:2504.05586), which tries the most and the
        least frequent pair and estimates again after each drop; this takes the most frequent, as is
        best for ``ets`` there, and all counts from one pass. Ties go to the larger ids
    Not defined when: an expert has no tokens; it falls before all that have some
    """
    return _by_pairs(evidence.tallies["pair_count"].astype(np.float64), evidence)


def ets(evidence: Evidence, /) -> NDArray[np.float64]:
    """Rank of falling, the less used of the pair that shares most token ids first.

    Formula: as ``ecc``, with pairs ordered by the number of different token ids that both see,
        estimated from sketches as |A| + |B| - |A ∪ B|, each with a standard error of 3.3 %; so an
        overlap is off by about 5 % of the union, and small ones are noise
    Needs: routing, vocabulary
    Direction: higher is kept
    Cost: O(1024 n_layers n_experts²)
    Source: ETS of MC-Suite, Jaiswal et al. 2025 (arXiv:2504.05586), whose best direction this is;
        differs: all from one pass, where the paper estimates again after each drop
    Not defined when: an expert has no tokens; it falls before all that have some
    """
    layers = [shared_by_all(sketch) for sketch in evidence.tallies["token_sketch"]]
    return _by_pairs(np.stack(layers), evidence)


def _by_pairs(alike: NDArray[np.float64], evidence: Evidence) -> NDArray[np.float64]:
    """Ranks of every layer's experts from the likeness of pairs: (n_layers, n_experts)."""
    layers = zip(alike, evidence.tallies.count, evidence.counts, strict=True)
    return evidence.stacked(_fall(pairs[:n, :n], count[:n]) for pairs, count, n in layers)


def _fall(alike: NDArray[np.float64], count: NDArray[np.int64]) -> NDArray[np.float64]:
    """Ranks of one layer's experts."""
    n_experts = len(count)
    first, second = (side[::-1] for side in np.triu_indices(n_experts, 1))  # larger ids come first
    order = descending(alike[first, second])
    loser = np.where(count[first] < count[second], first, second)
    left = count > 0
    gone = np.flatnonzero(~left)[::-1].tolist()
    for at in range(0, len(order), PAIRS):
        some = order[at : at + PAIRS]
        some = some[left[first[some]] & left[second[some]]]
        for one, other, less_used in zip(first[some], second[some], loser[some], strict=True):
            if left[one] and left[other]:
                left[less_used] = False
                gone.append(int(less_used))
    return rank_by_fall(gone, n_experts)


def descending(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Places of some values, the largest first and equal ones in their order.

    As a stable sort gives them, in a third of its time: the fast sort, then that of equal ones.

    Examples
    --------
    >>> descending(np.array([1.0, 2.0, 1.0])).tolist()
    [1, 0, 2]
    """
    order = np.argsort(-values)
    ranked = values[order]
    run = np.zeros(len(values), np.int64)
    np.cumsum(ranked[1:] != ranked[:-1], out=run[1:])
    return np.sort(run * len(values) + order) % max(1, len(values))


def rank_by_fall(gone: list[int], n_experts: int) -> NDArray[np.float64]:
    """Scores from the order in which experts fall; those that do not fall come last.

    Examples
    --------
    >>> rank_by_fall([2, 0], 3).tolist()
    [1.0, 2.0, 0.0]
    """
    found = np.full(n_experts, float(len(gone)))
    found[gone] = np.arange(len(gone))
    return found


_VOCABULARY = Needs.ROUTING | Needs.VOCABULARY
CRITERIA = (
    Criterion("evtc", _VOCABULARY, evtc),
    Criterion("ecc", Needs.ROUTING | Needs.PAIRS, ecc),
    Criterion("ets", _VOCABULARY, ets),
)
