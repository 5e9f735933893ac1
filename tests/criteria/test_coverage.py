"""Coverage of tokens and patterns, beside a slow twin and by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import Recorded

from moecollab import _core
from moecollab.criteria.base import Evidence
from moecollab.criteria.coverage import (
    by_layer,
    coverage,
    harm,
    output_coverage,
    pattern_coverage,
    pattern_rows,
    token_rows,
    turned,
)
from moecollab.criteria.scoring import score
from moecollab.errors import DataError, MissingInputError, SettingsError, ShapeError
from moecollab.patterns.dictionary import HSDL
from moecollab.record.rows import Rows
from moecollab.record.tallies import Tallies


def slow(values, weight, power):
    """Order and damages, every damage computed anew from the formula."""
    mass = values.sum(axis=1)
    share = values / np.where(mass > 0, mass, 1)[:, None]

    def damage(gone):
        return (weight * mass * share[:, gone].sum(axis=1) ** power).sum()

    gone, added = [], np.zeros(values.shape[1])
    for _ in range(values.shape[1]):
        left = [site for site in range(values.shape[1]) if site not in gone]
        rise = {site: damage([*gone, site]) - damage(gone) for site in left}
        site = min(left, key=lambda one: (rise[one], -one))
        added[site] = rise[site]
        gone.append(site)
    return gone, added


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 8), st.floats(1.0, 4.0))
def test_order_is_that_of_the_slow_twin(seed, n_rows, n_sites, power):
    rng = np.random.default_rng(seed)
    values = rng.random((n_rows, n_sites)) * (rng.random((n_rows, n_sites)) < 0.6)
    weight = rng.random(n_rows)
    rows = Rows.of(values)
    arrays = (rows.indptr, rows.sites, rows.values)
    found = _core.coverage_order(arrays, n_sites, weight, power)
    order, added = slow(values.astype(np.float32).astype(np.float64), weight, power)
    used = values.any(axis=0)
    assert [s for s in found["order"].tolist() if used[s]] == [s for s in order if used[s]]
    np.testing.assert_allclose(found["damage"], added, atol=1e-9)


def test_bad_input_is_named():
    rows = Rows.of([[1.0, 2.0]])
    arrays, ones = (rows.indptr, rows.sites, rows.values), np.ones(1)
    with pytest.raises(SettingsError, match=r"power is '0\.5'; it must be finite and at least 1"):
        _core.coverage_order(arrays, 2, ones, 0.5)
    with pytest.raises(ShapeError, match="weight has length 2, expected 1"):
        _core.coverage_order(arrays, 2, np.ones(2), 2.0)
    with pytest.raises(DataError, match="weight holds -1"):
        _core.coverage_order(arrays, 2, -ones, 2.0)
    with pytest.raises(ShapeError, match="weight is float32; pass a numpy array of float64"):
        _core.coverage_order(arrays, 2, ones.astype(np.float32), 2.0)


def test_experts_that_share_tokens_do_not_fall_together(tmp_path):
    """Tokens draw (1, 1, 0, 0), (1, 1, 0, 0) and (0, 0, 3, 3): the first two experts of the first
    tokens have the smaller sums, but one of each pair stays to the last two.
    """
    table = Recorded(
        expert=np.array([[[0, 1], [1, 0], [2, 3]]], np.uint16),
        weight=np.full((1, 3, 2), 0.5, np.float32),
        norm=np.array([[[2, 2], [2, 2], [6, 6]]], np.float32),
        sample=np.zeros(3, int),
        n_experts=4,
        layers=(0,),
        domains=("all",),
    )
    acts = table.save(tmp_path / "a")
    # Expert 1 adds 1²/2 of each of two tokens, then 3 adds 3²/6, then 0 and 2 the rest.
    assert score("output_coverage", acts).values.tolist() == [[3.0, 1.0, 4.5, 1.5]]
    assert score("reap_sum", acts).values.tolist() == [[2.0, 2.0, 3.0, 3.0]]


def test_layers_harm_tokens_apart():
    """Tokens draw 1 and 3 from the two experts of one layer, 2 from one of the other's."""
    rows = Rows.of([[1, 3, 2, 0], [0, 0, 0, 5], [0, 0, 0, 0]])
    evidence = Evidence(tallies=Tallies.zeros(("a",), 2, 2).total(), top_k=2)
    cut = by_layer(rows, evidence)
    expected = [[1, 3, 0, 0], [0, 0, 2, 0], [0, 0, 0, 5]]
    np.testing.assert_array_equal(cut.dense(), expected)
    assert cut.sample.tolist() == [0, 0, 1]
    # 1 of 4 is gone, then all: 4 (1/4)², 4 - 4 (1/4)²; the others are alone in their rows.
    np.testing.assert_allclose(harm(cut), [0.25, 3.75, 2, 5])


@pytest.mark.parametrize("density", [0, 0.1, 0.4, 1])
def test_rows_are_cut_at_layers_one_after_the_other(density):
    rng = np.random.default_rng(0)
    dense = rng.random((40, 12)) * (rng.random((40, 12)) < density)
    dense[[0, 7, 8, 39]] = 0
    evidence = Evidence(tallies=Tallies.zeros(("a",), 3, 4).total(), top_k=2)
    expected, sample = [], []
    for number, row in enumerate(dense.astype(np.float32)):
        for layer in range(3):
            own = np.where(np.arange(12) // 4 == layer, row, 0)
            if own.any():
                expected.append(own)
                sample.append(number)
    cut = by_layer(Rows.of(dense), evidence)
    np.testing.assert_array_equal(cut.dense(), np.reshape(expected, (-1, 12)))
    assert cut.sample.tolist() == sample


def test_layers_are_scored_as_each_alone(acts):
    """Harm in one layer does not know the other: the same from rows of that layer alone."""
    evidence = Evidence(tallies=acts.tallies().total(), top_k=2, activations=acts)
    found, dense = output_coverage(evidence), token_rows(evidence).dense()
    for layer in range(2):
        own = dense[:, layer * 6 : (layer + 1) * 6]
        np.testing.assert_allclose(found[layer], harm(Rows.of(own)), rtol=1e-6)


def test_coverage_counts_by_the_angle(acts):
    """With p = 1 it is the geometric mean of EASY-EP's and REAP's sums."""
    tallies = acts.tallies().total()
    evidence = Evidence(tallies=tallies, top_k=2, activations=acts)
    found = harm(by_layer(turned(token_rows(evidence), evidence), evidence), power=1.0)
    expected = np.sqrt(tallies["sum_shift"] * tallies["sum_weighted_norm"]).ravel()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(coverage(evidence).sum(), expected.sum(), rtol=1e-5)


def test_coverage_by_hand(tmp_path):
    """One token: 1 and 3 from the experts of a layer that shifts it by ¼, 2 and 2 where it is 1.

    v is (½, 3/2) and (2, 2); of mass 2 a quarter goes first, of mass 4 a half.
    """
    table = Recorded(
        expert=np.array([[[0, 1]], [[0, 1]]], np.uint16),
        weight=np.full((2, 1, 2), 0.5, np.float32),
        norm=np.array([[[2, 6]], [[4, 4]]], np.float32),
        shift=np.array([[0.25], [1.0]]),
        sample=np.zeros(1, int),
        n_experts=2,
        domains=("all",),
    )
    found = score("coverage", table.save(tmp_path / "a")).values
    np.testing.assert_allclose(found, [[1 / 8, 15 / 8], [3, 1]], rtol=1e-6)


def test_coverage_of_each_layer_is_that_of_the_slow_twin(acts, collaboration):
    tallies = acts.tallies().total()
    evidence = Evidence(tallies=tallies, top_k=2, activations=acts, collaboration=collaboration)
    shift, output = tallies["sum_shift"], tallies["sum_weighted_norm"]
    angle = np.sqrt(np.divide(shift, output, out=np.zeros(output.shape), where=output > 0))
    for function, rows in ((coverage, token_rows), (pattern_coverage, pattern_rows)):
        found, dense = function(evidence), rows(evidence).dense().astype(np.float64)
        for layer in range(2):
            own = dense[:, layer * 6 : (layer + 1) * 6] * angle[layer]
            _, expected = slow(own, np.ones(len(own)), 2.0)
            np.testing.assert_allclose(found[layer], expected, rtol=1e-4, atol=1e-6)


def test_with_power_one_both_are_total_output(acts, collaboration):
    total = acts.tallies().total()
    evidence = Evidence(tallies=total, top_k=2, activations=acts, collaboration=collaboration)
    expected = total["sum_weighted_norm"].ravel()
    for rows in (token_rows(evidence), pattern_rows(evidence), pattern_rows(evidence, -1)):
        np.testing.assert_allclose(harm(rows, power=1.0), expected, rtol=1e-6)


def with_patterns(acts, atoms, usage, peak, **settings):
    """Evidence with one level of atoms."""
    level = SimpleNamespace(
        atoms=np.array(atoms, np.float32), usage=np.array(usage), peak=np.array(peak)
    )
    collab = SimpleNamespace(levels=(level,), n_sites=len(atoms[0]), settings=settings)
    return Evidence(tallies=acts.tallies().total(), top_k=2, activations=acts, collaboration=collab)


def test_rows_of_patterns_by_hand(tmp_path):
    """Weights of the sites add up to 3, 1 and 0, atoms say 2, 2 and 4; outputs are 30, 5 and 0.

    Of site 0 a third is left over, site 1 is scaled down, site 2 was never used, and the second
    atom is dead.
    """
    table = Recorded(
        expert=np.array([[[0, 1]] * 2], np.uint16),
        weight=np.array([[[1.5, 0.5], [1.5, 0.5]]], np.float32),
        norm=np.array([[[10, 5], [10, 5]]], np.float32),
        sample=np.zeros(2, int),
        n_experts=3,
        layers=(0,),
        domains=("all",),
        shift=np.ones((1, 2)),
    )
    acts = table.save(tmp_path / "a")
    atoms, usage = [[0.5, 0.5, 1], [1, 1, 1]], [4.0, 9.0]
    evidence = with_patterns(acts, atoms, usage, [1.0, 0.0], rows="token", weights="raw")
    found = pattern_rows(evidence).dense()
    expected = [[20, 5, 0], [0, 0, 0], [10, 0, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Site 1 adds 5²/25; site 0 the rest of 25, and 10 that no atom explains.
    np.testing.assert_allclose(pattern_coverage(evidence), [[34.0, 1.0, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("rows", ["token", "sample", "sample_sum"])
@pytest.mark.parametrize("weights", ["renormalised", "raw", "binary", "output"])
def test_atoms_that_explain_all_leave_nothing(acts, rows, weights):
    """The sums of the fitted rows as one atom: whatever was fitted, its units cancel out."""
    total = acts.rows(rows, weights).dense().sum(axis=0, dtype=np.float64)
    atoms, usage = [total / total.max()], [total.max()]
    evidence = with_patterns(acts, atoms, usage, [1.0], rows=rows, weights=weights)
    found = pattern_rows(evidence).dense()
    output = acts.tallies().total()["sum_weighted_norm"].ravel()
    np.testing.assert_allclose(found[0], output, rtol=1e-5)
    assert found[1:].max() < 1e-4 * output.max()


def test_patterns_fitted_on_samples_are_scored(acts):
    fitted = HSDL(atoms=(4,), rows="sample", seed=0, threads=1).fit(acts)
    found = score("pattern_coverage", acts, collaboration=fitted).values
    total = acts.tallies().total()
    expected = np.sqrt(total["sum_shift"] * total["sum_weighted_norm"]).sum()
    np.testing.assert_allclose(found.sum(), expected, rtol=1e-6)


@pytest.mark.parametrize("function", [coverage, output_coverage, pattern_coverage])
def test_functions_say_what_they_lack(function):
    bare = Evidence(tallies=Tallies.zeros(("a",), 1, 2).total(), top_k=1)
    with pytest.raises(MissingInputError, match=r"are needed; (pass activations|fit them)"):
        function(bare)
