"""Criteria that read single tokens, beside slow twins."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import Recorded

from moecollab.criteria.base import Evidence
from moecollab.criteria.scoring import score
from moecollab.criteria.tokens import _election, _values, ranked_choice, shapley
from moecollab.errors import MissingInputError
from moecollab.record.activations import LayerTable
from moecollab.record.tallies import Tallies


def make_table(experts, weights=None, following=None):
    experts = np.array(experts, np.uint16)
    weights = np.ones(experts.shape) if weights is None else np.array(weights)
    following = None if following is None else np.array(following, np.uint16)
    return LayerTable(experts, weights.astype(np.float32), None, following)


def values(table, n_experts):
    draws = np.random.default_rng(7).integers(0, 2**64, n_experts + 1, np.uint64)
    draws[-1] = 0
    return _values(table, draws)


def test_shapley_by_hand():
    """{0, 1} three times, {0, 2} once, {1, 2} twice: 4, 5 and 3 tokens with 0, 1 and 2.

    α = (1/3, 2/3, 1/4), from sets {0, 2}, {1, 2} and {0, 2}, which add nothing.
    """
    table = make_table([[0, 1], [1, 0], [0, 1], [0, 2], [1, 2], [2, 1]])
    expected = [3 - 5 / 3, 3 - 4 * 2 / 3, 2 - 5 / 4]
    np.testing.assert_allclose(values(table, 4), [*expected, 0], rtol=1e-12)


def brute(sets, n_experts):
    """The same over all sets that there could be."""
    served = Counter(map(frozenset, sets))
    every = [
        frozenset(one) for k in range(n_experts + 1) for one in combinations(range(n_experts), k)
    ]

    def around(rest):
        return sum(served[rest | {other}] for other in range(n_experts) if other not in rest)

    found = np.zeros(n_experts)
    for expert in range(n_experts):
        own = [one for one in every if expert in one and served[one]]
        least = min((served[one] / around(one - {expert}) for one in own), default=0)
        found[expert] = sum(served[one] - least * around(one - {expert}) for one in own)
    return found


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 60))
def test_shapley_is_its_definition_on_six_experts(seed, top_k, n_tokens):
    rng = np.random.default_rng(seed)
    experts = np.array([rng.permutation(6)[:top_k] for _ in range(n_tokens)])
    weights = rng.random(experts.shape) * (rng.random(experts.shape) < 0.9)
    used = [row[weight != 0] for row, weight in zip(experts, weights, strict=True)]
    found = values(make_table(experts, weights), 6)
    np.testing.assert_allclose(found, brute([row.tolist() for row in used], 6), atol=1e-9)


def test_ranked_choice_by_hand():
    """Votes 2, 1, 2, 0: 3 falls, then 1, whose token goes to 2; then 0 with 2 votes against 3."""
    ballots = [[0, 1, 2, 3], [0, 2, 1, 3], [1, 2, 0, 3], [2, 1, 0, 3], [2, 0, 1, 3]]
    table = make_table([row[:1] for row in ballots], following=[row[1:] for row in ballots])
    assert _election(table, 4).tolist() == [2, 1, 3, 0]


def slow_election(ballots, top_k, n_experts):
    """The same with all votes counted anew in every round."""
    left, gone = set(range(n_experts)), []
    while left:
        votes = Counter()
        for ballot in ballots:
            votes.update([expert for expert in ballot if expert in left][:top_k])
        lost = min(left, key=lambda expert: (votes[expert], -expert))
        left.remove(lost)
        gone.append(lost)
    return np.argsort(gone)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(3, 8), st.integers(1, 40))
def test_ranked_choice_is_its_definition(seed, top_k, n_experts, n_tokens):
    """Ballots may be shorter than all experts, but no slot is unused."""
    rng = np.random.default_rng(seed)
    n_next = min(2 * top_k, n_experts - top_k)
    ballots = np.array([rng.permutation(n_experts) for _ in range(n_tokens)])[:, : top_k + n_next]
    table = make_table(ballots[:, :top_k], following=ballots[:, top_k:])
    expected = slow_election(ballots.tolist(), top_k, n_experts)
    assert _election(table, n_experts).tolist() == expected.tolist()


def test_unused_slots_and_missing_choices_do_not_vote():
    none = 65_535
    table = make_table([[0, 1], [0, 1]], [[1, 0], [1, 0.5]], [[2, none], [2, none]])
    assert _election(table, 3).tolist() == slow_election([[0], [0, 1]], 2, 3).tolist() == [2, 1, 0]


def test_relabelled_experts_get_relabelled_ranks(tmp_path):
    """Without ties: expert e is chosen first by 2^e tokens."""
    chosen = np.repeat(np.arange(4), 2 ** np.arange(4))
    ballots = np.array(
        [[first, *np.delete([3, 1, 0, 2], [3, 1, 0, 2].index(first))] for first in chosen]
    )
    table = Recorded(
        expert=ballots[None, :, :1].astype(np.uint16),
        weight=np.ones((1, 15, 1), np.float32),
        norm=None,
        sample=np.zeros(15, int),
        n_experts=4,
        layers=(0,),
        next=ballots[None, :, 1:].astype(np.uint16),
    )
    order = [2, 0, 3, 1]
    first, second = (
        score("ranked_choice", made.save(tmp_path / name)).values[0]
        for name, made in (("a", table), ("b", table.relabelled(order)))
    )
    assert (second == first[order]).all()


@pytest.mark.parametrize("function", [shapley, ranked_choice])
def test_functions_say_what_they_lack(function):
    bare = Evidence(tallies=Tallies.zeros(("a",), 1, 2).total(), top_k=1)
    with pytest.raises(MissingInputError, match="single tokens are needed; pass activations"):
        function(bare)


def test_ballots_need_preferences():
    with pytest.raises(MissingInputError, match="no preferences were recorded"):
        _election(make_table([[0]]), 2)
