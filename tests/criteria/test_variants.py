"""Variants of coverage that are studied: those with arithmetic of their own, by hand."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from synthetic import Recorded

from moecollab import criteria
from moecollab.criteria.base import FORM, Evidence
from moecollab.criteria.coverage import fitted_rows, harm, pattern_rows
from moecollab.criteria.scoring import score
from moecollab.record.rows import Rows


@pytest.fixture(scope="module")
def variants():
    path = Path(__file__).parents[2] / "benches" / "pattern_variants.py"
    spec = importlib.util.spec_from_file_location("pattern_variants", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def registered(variants):
    yield variants.register_variants()
    for function in variants.VARIANTS:
        criteria.unregister(function.__name__)


@pytest.fixture
def evidence(acts, collaboration):
    by_domain = acts.tallies()
    return Evidence(
        tallies=by_domain.total(),
        by_domain=by_domain,
        top_k=2,
        activations=acts,
        collaboration=collaboration,
        drop=0.5,
    )


def test_all_are_scored_by_name_and_documented(registered, acts, collaboration):
    for name in registered:
        found = score(name, acts, collaboration=collaboration, drop=0.5)
        assert np.isfinite(found.values).all()
        assert (found.values >= 0).all()
        form = criteria.get(name).form
        assert [line for line in form if line != "summary"] == list(FORM)
        needs = [str(need.name).lower().replace("_", " ") for need in criteria.get(name).needs]
        assert form["needs"] == ", ".join(needs)


def test_lift_by_hand(variants):
    """Of four tokens, two use 0 and 1 and two use 2: n = (2, 2, 2), n_01 = 2, n_02 = 0.

    Expected is 2 · 2 / 4 = 1 of every pair, so {0, 1} has lift 2, {0, 2} none, {0, 1, 2} 2 of 3,
    and {0, 1} with strengths 1 and 0.5 again 2; a member below 0.5 does not count.
    """
    used = Rows.of([[1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]])
    acts = SimpleNamespace(
        token_blocks=lambda weights, size: [used.take([0]), used.take([1, 2, 3])]
    )
    atoms = [[1, 1, 0], [1, 0, 1], [1, 1, 1], [1, 0.5, 0], [1, 0.4, 0], [0, 1, 0]]
    found = variants._lifts(np.array(atoms, np.float32), SimpleNamespace(activations=acts))
    np.testing.assert_allclose(found, [2, 1 / 4, 2 / 3, 2, 1, 1])


def test_lift_of_patterns_that_meet_by_chance_is_contribution(variants, evidence, monkeypatch):
    monkeypatch.setattr(variants, "_lifts", lambda atoms, evidence: np.ones(len(atoms)))
    expected = evidence.tallies["sum_weighted_norm"]
    np.testing.assert_allclose(variants.lift(evidence), expected, rtol=1e-6)


def test_what_mates_cannot_put_out_by_hand(variants):
    """Experts 0 and 1 put out the same, 2 something else, 3 half of both in direction."""
    total = np.array([[1.0, 0], [3.0, 0], [0, 2.0], [1.0, 1.0], [0, 0]])
    likeness = variants._likeness(total)
    left = variants._residuals(
        np.array([[1, 1, 0, 0, 0], [1, 0.5, 0, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 0, 1]]), likeness
    )
    # Full mates that are alike leave nothing; of a half mate (1 - 0.5²)½ is left.
    np.testing.assert_allclose(left[0], [0, 0, 1, 1, 1], atol=1e-7)
    np.testing.assert_allclose(left[1], [0.75**0.5, 0, 1, 1, 1], atol=1e-7)
    # Each of 0, 2 and 3 lies in the plane of the two others; 4 puts out nothing.
    np.testing.assert_allclose(left[2], [0, 1, 0, 0, 1], atol=1e-7)
    np.testing.assert_allclose(left[3], 1)


def test_redundancy_without_mates_is_pattern_coverage(variants, evidence, monkeypatch):
    monkeypatch.setattr(variants, "_residuals", lambda atoms, likeness: np.ones(atoms.shape))
    expected = harm(pattern_rows(evidence)).reshape(2, 6)
    np.testing.assert_allclose(variants.redundancy(evidence), expected, rtol=1e-6)


def test_the_worst_domain_is_harmed_less(variants):
    """Experts 0 to 2 serve the large domain 0, 3 and 4 the small domain 1; three of five go.

    By harm alone they are 4 with 1/3, 2 with 16/13 and 3 with 8/3, and domain 1 has lost all. The
    worst domain is harmed least when 4, 1 and 2 go.
    """
    rows = Rows.of([[5, 4, 4, 0, 0], [0, 0, 0, 2, 1]])
    domain = np.array([0, 1])
    plain = np.argsort(harm(rows))[:3]
    assert {3, 4} <= set(plain.tolist())
    fair = variants._fairest(rows, domain, drop=0.6)
    gone = np.argsort(fair)[:3].tolist()
    assert sorted(gone) == [1, 2, 4]
    np.testing.assert_allclose(variants._row_harms(rows, gone), [64 / 13, 1 / 3])


@pytest.mark.parametrize("name", ["fair_coverage", "fair_patterns"])
def test_fairness_lessens_the_worst_harm(variants, name, evidence, monkeypatch):
    """Against one round, which weights all domains alike."""
    found = getattr(variants, name)(evidence)
    monkeypatch.setattr(variants, "ROUNDS", 1)
    alike = getattr(variants, name)(evidence)
    rows, domain = variants._coverage_rows(evidence), variants._domains(evidence)
    if name == "fair_patterns":
        parts = variants._domain_rows(evidence)
        rows, domain = Rows.join(parts), np.repeat([0, 1], [part.n_rows for part in parts])
    else:
        domain = domain[rows.sample]
    mass = np.bincount(domain, variants._row_sums(rows))

    def worst(values):
        gone = np.argsort(values.ravel(), kind="stable")[:6]
        return (np.bincount(domain, variants._row_harms(rows, gone)) / mass).max()

    assert worst(found) <= worst(alike) + 1e-12


def test_rows_of_domains_add_up_to_their_outputs(variants, evidence):
    output = evidence.by_domain["sum_weighted_norm"]
    for part, expected in zip(variants._domain_rows(evidence), output, strict=True):
        np.testing.assert_allclose(part.dense().sum(axis=0), expected.ravel(), rtol=1e-5)


def test_shift_coverage_with_power_one_is_easy_ep(variants, evidence, monkeypatch):
    monkeypatch.setattr(variants, "harm", lambda rows: harm(rows, power=1.0))
    shift = evidence.tallies["sum_shift"]
    np.testing.assert_allclose(variants.shift_coverage(evidence), shift, rtol=1e-5)


def test_layers_together_harm_more_than_each(variants, evidence):
    """A token that loses half of one layer has lost less than half of all."""
    whole = variants.whole_coverage(evidence).sum()
    output = evidence.tallies["sum_weighted_norm"].sum()
    np.testing.assert_allclose(whole, output, rtol=1e-6)  # all gone: the whole mass of every token


def test_caep_in_units_of_output_by_hand(variants, tmp_path):
    """Both experts of the one pattern have weight 2 and code 1; expert 1 puts out ten times more.

    At drop ½, k₁ = 0.65 puts the threshold at the lesser: neither falls before the pattern, and
    then by contribution, where ``caep`` would let the larger id go first.
    """
    table = Recorded(
        expert=np.array([[[0, 1]] * 4], np.uint16),
        weight=np.full((1, 4, 2), 0.5, np.float32),
        norm=np.array([[[10, 1]] * 4], np.float32)[:, :, ::-1],
        sample=np.zeros(4, int),
        n_experts=2,
        layers=(0,),
        domains=("all",),
    )
    acts = table.save(tmp_path / "a")
    level = SimpleNamespace(atoms=np.ones((1, 2), np.float32), usage=np.ones(1), peak=np.ones(1))
    settings = {"rows": "token", "weights": "raw"}
    found = Evidence(
        tallies=acts.tallies().total(),
        top_k=2,
        activations=acts,
        collaboration=SimpleNamespace(levels=(level,), n_sites=2, settings=settings),
        drop=0.5,
    )
    assert next(iter(fitted_rows(found))).values.tolist() == [0.5] * 8
    assert variants.caep_output(found).tolist() == [[0, 1]]
    assert criteria.get("caep").function(found).tolist() == [[1, 0]]
