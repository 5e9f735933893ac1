"""CAEP on patterns small enough to follow by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecollab.criteria.base import Evidence
from moecollab.criteria.caep import caep, caep_composed, ranks, threshold_fraction
from moecollab.errors import MissingInputError
from moecollab.record.tallies import Tallies


def evidence(atoms, usage, drop, n_layers=1):
    atoms = np.asarray(atoms, dtype=np.float32)
    usage = np.asarray(usage, dtype=np.float64)
    level = SimpleNamespace(atoms=atoms, usage=usage, peak=np.ones_like(usage))
    return Evidence(
        tallies=_zeros(n_layers, atoms.shape[1] // n_layers),
        top_k=1,
        collaboration=SimpleNamespace(levels=(level,)),
        drop=drop,
    )


def _zeros(n_layers, n_experts):
    return Tallies.zeros(("all",), n_layers, n_experts).total()


def published(atoms, usage, k1, k2):
    """Algorithm 1 as printed: which experts are kept when its loop ends."""
    atoms, usage = np.asarray(atoms, dtype=np.float64), np.asarray(usage, dtype=np.float64)
    alive = np.ones(len(usage), dtype=bool)
    e = usage @ atoms
    n = len(e)
    threshold = np.sort(e)[::-1][math.ceil(k1 * n) - 1]
    mask = e >= threshold
    while mask.sum() > (1 - k2) * n + 1e-9 and alive.any():
        alive[np.flatnonzero(alive)[usage[alive].argmin()]] = False
        e = usage[alive] @ atoms[alive]
        mask = e >= threshold
    return mask


def test_threshold_leaves_headroom_and_has_a_cap():
    assert threshold_fraction(0.25) == pytest.approx(0.9)
    assert threshold_fraction(0.5) == pytest.approx(0.65)
    assert threshold_fraction(0.0) == 0.99


def test_ranks_order_by_step_then_contribution_then_smaller_site():
    step = np.array([2, 0, 1, 1, 0, 2])
    contribution = np.array([1.0, 5.0, 3.0, 3.0, 4.0, 9.0])
    # 4 falls before 1 (smaller contribution), 3 before 2 (equal, larger site), then 0, then 5.
    assert ranks(step, contribution).tolist() == [4, 1, 3, 2, 0, 5]


def test_hand_computed_ranking():
    """Three patterns: experts {0,1}, {2,3} and {4}; expert 5 is in none.

    e = (10, 9, 3, 2.7, 1, 0). With drop 0.5, k1 = 0.65 and the threshold is entry 4 of 6: 2.7.
    Experts 4 and 5 lie below it from the start; deleting {4} changes nothing, deleting {2,3} fells
    both, deleting {0,1} the rest.
    """
    atoms = [[1, 0.9, 0, 0, 0, 0], [0, 0, 1, 0.9, 0, 0], [0, 0, 0, 0, 1, 0]]
    found = caep(evidence(atoms, [10, 3, 1], drop=0.5, n_layers=2))
    assert found.tolist() == [[5, 4, 3], [2, 1, 0]]


def test_an_expert_of_rare_patterns_falls_before_one_of_a_frequent_pattern():
    """Expert 0 gathers more in sum, but from patterns that are deleted first."""
    atoms = [[0.9, 0, 0.1], [0.9, 0, 0.1], [0, 1, 0]]
    found = caep(evidence(atoms, [4, 4, 6], drop=0.4))
    gathered = np.array([7.2, 6.0, 0.8])
    assert gathered.argmax() == 0
    assert found.tolist() == [[1, 2, 0]]


@given(
    st.integers(0, 2**32 - 1), st.integers(2, 8), st.sampled_from([0.25, 0.5]), st.integers(4, 24)
)
def test_ranking_contains_the_published_mask(seed, n_atoms, drop, n_sites):
    """What the printed loop keeps is kept at the same budget, filled up from the last to fall."""
    rng = np.random.default_rng(seed)
    atoms = rng.random((n_atoms, n_sites)) * (rng.random((n_atoms, n_sites)) < 0.5)
    atoms = atoms.astype(np.float32)
    usage = rng.random(n_atoms) + 0.1
    mask = published(atoms, usage, threshold_fraction(drop), drop)
    score = caep(evidence(atoms, usage, drop)).ravel()
    assert sorted(score) == list(range(n_sites))
    n_kept = n_sites - math.floor(drop * n_sites + 0.5)
    kept = score >= n_sites - n_kept
    if mask.sum() <= n_kept:
        assert kept[mask].all()


@given(st.integers(0, 2**32 - 1))
def test_relabelled_experts_get_relabelled_ranks(seed):
    rng = np.random.default_rng(seed)
    atoms = rng.random((4, 10)).astype(np.float32)
    usage = rng.random(4)
    order = rng.permutation(10)
    first = caep(evidence(atoms, usage, 0.25)).ravel()
    second = caep(evidence(atoms[:, order], usage, 0.25)).ravel()
    assert (second == first[order]).all()


def test_function_says_what_it_lacks():
    bare = Evidence(tallies=_zeros(1, 2), top_k=1)
    with pytest.raises(MissingInputError, match="caep needs a collaboration"):
        caep(bare)


def test_composed_levels_rank_by_the_finest_one():
    """Level 1 keeps experts 0 and 1 longest, level 2 experts 2 and 3."""

    def level(atoms, usage):
        found = np.asarray(atoms, np.float32), np.asarray(usage, np.float64)
        return SimpleNamespace(atoms=found[0], usage=found[1], peak=np.ones(len(usage)))

    coarse = level([[1, 0.9, 0, 0], [0, 0, 1, 0.9]], [10, 3])
    fine = level([[1, 0.9, 0, 0], [0, 0, 1, 0.9]], [2, 8])
    both = SimpleNamespace(levels=(coarse, fine))
    one = SimpleNamespace(levels=(coarse,))
    given = {"tallies": _zeros(1, 4), "top_k": 1, "drop": 0.5}
    assert caep(Evidence(**given, collaboration=both)).tolist() == [[3, 2, 1, 0]]
    assert caep_composed(Evidence(**given, collaboration=both)).tolist() == [[1, 0, 3, 2]]
    assert caep_composed(Evidence(**given, collaboration=one)).tolist() == [[3, 2, 1, 0]]


def test_usage_of_the_finest_level_is_that_of_composed_codes(collaboration):
    """e = D_2 R_2 R_1 1, from the codes and links themselves."""
    links = collaboration.levels[1].links
    first = collaboration.codes.matrix(len(links)).toarray()
    composed = first @ links
    usage = collaboration.levels[1].usage
    np.testing.assert_allclose(composed.sum(axis=0), usage, rtol=1e-4, atol=1e-4)
