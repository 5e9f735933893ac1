"""Criteria that compare experts with each other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecollab.criteria.base import Evidence
from moecollab.criteria.pairs import descending, ecc, ets, evtc
from moecollab.record.sketch import add_tokens, distinct, shared, shared_by_all
from moecollab.record.sums import REGISTERS
from moecollab.record.tallies import Tallies


def evidence(counts, **arrays):
    held = {name: np.array([value]) for name, value in arrays.items()}
    return Evidence(tallies=Tallies((), {"count": np.array([counts]), **held}), top_k=2)


def sketches(*ids):
    """A sketch of each set of ids."""
    found = np.zeros((len(ids), REGISTERS), np.uint8)
    for site, own in enumerate(ids):
        add_tokens(found, np.full(len(own), site), np.array(own, np.int64))
    return found


def pairs(n_experts, **together):
    """A symmetric matrix from counts such as `_01=3`."""
    found = np.zeros((n_experts, n_experts), np.int64)
    for name, count in together.items():
        one, other = map(int, name[1:])
        found[one, other] = found[other, one] = count
    return found


def test_of_the_pair_chosen_most_often_the_less_used_falls():
    """3 was never used; of (0, 1) falls 1, then of (0, 2) 2, since (1, 2) is broken."""
    alike = pairs(4, _01=3, _12=2, _02=1)
    assert ecc(evidence([5, 4, 3, 0], pair_count=alike)).tolist() == [[3, 1, 2, 0]]
    assert ecc(evidence([4, 5, 3, 0], pair_count=alike)).tolist() == [[1, 3, 2, 0]]


def test_equal_pairs_and_equal_use_keep_the_smaller_id():
    assert ecc(evidence([2, 2, 2], pair_count=pairs(3))).tolist() == [[2, 1, 0]]
    assert ecc(evidence([0, 0, 0], pair_count=pairs(3))).tolist() == [[2, 1, 0]]


def test_the_pair_that_shares_most_ids_breaks_first():
    """0 and 2 share all ids of 2; then 0 and 1 share a few."""
    seen = sketches(range(300), range(280, 500), range(0, 250, 2))
    assert ets(evidence([30, 20, 10], token_sketch=seen)).tolist() == [[2, 1, 0]]
    assert ets(evidence([10, 20, 30], token_sketch=seen)).tolist() == [[0, 1, 2]]


def test_coverage_counts_different_ids():
    found = evtc(evidence([9, 9, 0], token_sketch=sketches([5, 5, 7], range(100), [])))
    np.testing.assert_allclose(found, [[2, 100, 0]], rtol=0.1)


def test_shared_by_all_is_shared_pair_by_pair():
    rng = np.random.default_rng(0)
    sizes = [0, 1, 30, 500, 5_000, 60_000]
    found = sketches(*(rng.integers(0, 100_000, size) for size in sizes))
    expected = shared(found[:, None], found[None])
    np.testing.assert_allclose(shared_by_all(found), expected, rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(np.diag(shared_by_all(found)), distinct(found), rtol=1e-9)


def test_descending_is_a_stable_sort():
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 1_000):
        for high in (1, 5, 10**6):
            values = rng.integers(0, high, n).astype(np.float64)
            expected = np.argsort(-values, kind="stable")
            assert descending(values).tolist() == expected.tolist()


def test_overlap_is_as_exact_as_it_says():
    """Errors beside 5 % of the union: one standard error, over draws of ids."""
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(60):
        ids = rng.permutation(1_000_000)[:9_000]
        found = shared_by_all(sketches(ids[:6_000], ids[3_000:]))[0, 1]
        errors.append((found - 3_000) / 9_000)
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.06


def by_hand(alike, counts):
    """The same by looking at all pairs anew in every round."""
    left = set(np.flatnonzero(counts).tolist())
    gone = [expert for expert in reversed(range(len(counts))) if expert not in left]
    while len(left) > 1:
        pair = max((alike[i, j], i, j) for i in left for j in left if i < j)[1:]
        gone.append(min(pair, key=lambda one: (counts[one], -one)))
        left.remove(gone[-1])
    gone += left
    return np.argsort(gone)


@given(st.integers(0, 2**32 - 1), st.integers(2, 9))
def test_one_look_at_sorted_pairs_is_a_look_in_every_round(seed, n_experts):
    rng = np.random.default_rng(seed)
    half = np.triu(rng.permutation(n_experts**2).reshape(n_experts, n_experts), 1)
    alike, counts = half + half.T, rng.integers(0, 5, n_experts)
    found = ecc(evidence(counts, pair_count=alike))[0]
    assert found.tolist() == by_hand(alike, counts).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_relabelled_experts_get_relabelled_ranks(seed):
    rng = np.random.default_rng(seed)
    half = np.triu(rng.permutation(64).reshape(8, 8), 1)
    alike, counts, order = half + half.T, rng.permutation(8) + 1, rng.permutation(8)
    first = ecc(evidence(counts, pair_count=alike))[0]
    second = ecc(evidence(counts[order], pair_count=alike[order][:, order]))[0]
    assert (second == first[order]).all()
