"""Scores for several domains: sums of shares, and weights that raise the worst domain."""

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecollab.criteria.scores import load_scores
from moecollab.criteria.scoring import score
from moecollab.errors import DataError, PlanError, SettingsError, ShapeError
from moecollab.pruning.blending import blend
from moecollab.pruning.planning import plan
from scored import make_scores


def kept_share(scores, made):
    """Share of a domain's scores that a plan keeps, mean over the layers."""
    rows = zip(scores.values, made.keep.values(), strict=True)
    return np.mean([row[list(kept)].sum() / row.sum() for row, kept in rows])


def random_domains(rng, n_domains, n_layers, n_experts):
    drawn = rng.gamma(0.5, size=(n_domains, n_layers, n_experts)) + 1e-3
    return [make_scores(one) for one in drawn]


def test_shares_are_added():
    made = blend([make_scores([[1, 3], [0, 0]]), make_scores([[30, 10], [1, 1]])])
    assert made.values.tolist() == [[0.25 + 0.75, 0.75 + 0.25], [1.0, 1.0]]
    assert made.counts.tolist() == [[2, 2], [2, 2]]
    assert made.criterion == "frequency"
    halved = blend([make_scores([[1, 3]]), make_scores([[30, 10]])], weights=[1, 0.5])
    assert halved.values.tolist() == [[0.25 + 0.375, 0.75 + 0.125]]
    assert halved.settings["weights"] == [1.0, 0.5]


def test_size_of_a_domain_does_not_matter():
    first, second = make_scores([[1, 3, 2]]), make_scores([[5, 1, 1]])
    large = make_scores(second.values * 1000)
    assert np.allclose(blend([first, second]).values, blend([first, large]).values)


def test_the_worst_domain_is_raised():
    """By hand: of three experts two stay. The first domain is spread over 0 and 1, two others like
    2 alone; the sum keeps 2 and 0, so the first keeps half; no plan gives all of them more."""
    domains = [make_scores(v) for v in ([[5, 5, 0.0]], [[0, 2, 8]], [[0, 2, 8]], [[6, 1, 3]])]
    fair = blend(domains, how="fair", drop=1 / 3)
    made = plan(fair, drop=1 / 3)
    assert made.keep == {0: (0, 2)}
    assert min(kept_share(one, made) for one in domains) == pytest.approx(0.5)
    assert fair.settings["least_kept"] == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(12))
def test_fair_beside_every_set_and_many_weights(seed):
    """No plan beats the bound; no weighting of 200 beats ours by much."""
    rng = np.random.default_rng(seed)
    domains = random_domains(rng, 2 + seed % 2, 1 + seed % 2, 6)
    fair = blend(domains, how="fair", drop=0.5)
    made = plan(fair, drop=0.5)
    least = min(kept_share(one, made) for one in domains)
    assert least == pytest.approx(fair.settings["least_kept"], abs=1e-12)
    shares = np.stack([one.values / one.values.sum(axis=1, keepdims=True) for one in domains])
    sets = [np.isin(np.arange(6), one) for one in combinations(range(6), 3)]
    every = [
        (shares * np.stack(chosen)).sum(axis=(1, 2)).min() / shares.shape[1]
        for chosen in product(sets, repeat=shares.shape[1])
    ]
    assert least <= max(every) + 1e-12
    assert max(every) <= fair.settings["bound"] + 1e-9
    tried = [
        plan(blend(domains, weights=w), drop=0.5) for w in rng.dirichlet([1] * len(domains), 200)
    ]
    others = [min(kept_share(one, other) for one in domains) for other in tried]
    assert least >= max(others) - 0.011


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([0.25, 0.5, 0.75]))
def test_fair_is_never_worse_than_the_sum(seed, n_domains, drop):
    domains = random_domains(np.random.default_rng(seed), n_domains, 2, 8)
    fair, even = blend(domains, how="fair", drop=drop), blend(domains)
    worst = [min(kept_share(one, plan(b, drop=drop)) for one in domains) for b in (fair, even)]
    assert worst[0] >= worst[1] - 1e-12


def test_fair_comes_near_the_bound_where_there_are_many_experts():
    domains = random_domains(np.random.default_rng(0), 8, 12, 64)
    found = blend(domains, how="fair", drop=0.5).settings
    assert found["bound"] - found["least_kept"] < 0.003


def test_fair_scores_hold_for_one_drop(tmp_path):
    domains = random_domains(np.random.default_rng(0), 2, 2, 4)
    blend(domains, how="fair", drop=0.5, out=tmp_path / "fair.parquet")
    again = load_scores(tmp_path / "fair.parquet")
    assert plan(again, drop=0.5).n_dropped == 4
    with pytest.raises(PlanError, match=r"hold for drop=0.5, not 0.25"):
        plan(again, drop=0.25)


def test_blends_of_scores_for_one_drop_hold_for_it():
    quarter, half = (
        replace(make_scores([[1, 2, 3, 4]]), settings={"drop": drop}) for drop in (0.25, 0.5)
    )
    with pytest.raises(PlanError, match=r"hold for drop=0.25, not 0.5"):
        plan(blend([quarter, quarter]), drop=0.5)
    assert plan(blend([quarter, make_scores([[1, 2, 3, 4]])]), drop=0.25).n_dropped == 1
    with pytest.raises(PlanError, match=r"hold for drop=0.25 and 0.5"):
        blend([quarter, half])
    with pytest.raises(PlanError, match=r"hold for drop=0.25 and 0.5"):
        blend([quarter, quarter], how="fair", drop=0.5)


@pytest.mark.parametrize(
    ("scores", "asked", "error", "message"),
    [
        ([], {}, DataError, "no scores to blend"),
        ([[[1, 2]], [[1, 2, 3]]], {}, ShapeError, "not of the same layers, experts and top_k"),
        ([[[1, -2]]], {}, DataError, "as low as -2 have no shares"),
        ([[[1, 2]]], {"how": "best"}, SettingsError, "how is 'best'"),
        ([[[1, 2]]], {"how": "fair"}, SettingsError, "given with drop and without weights"),
        ([[[1, 2]]], {"how": "fair", "drop": 1.0}, SettingsError, r"drop is 1.0"),
        (
            [[[1, 2, 3, 4]]],
            {"how": "fair", "drop": 0.75, "top_k": 2},
            PlanError,
            "would keep 1 experts but the router selects top_k=2; lower drop to 0.5 or less",
        ),
        ([[[1, 2]]], {"weights": [1, 2]}, SettingsError, "1 numbers ≥ 0, not all 0"),
        ([[[1, 2]]], {"weights": [0.0]}, SettingsError, "not all 0"),
        ([[[1, 2]]], {"weights": [np.nan]}, SettingsError, "not all 0"),
    ],
)
def test_what_cannot_be_blended(scores, asked, error, message):
    top_k = asked.get("top_k", 1)
    others = {name: value for name, value in asked.items() if name != "top_k"}
    with pytest.raises(error, match=message):
        blend([make_scores(values, top_k) for values in scores], **others)


def test_scores_of_one_domain(acts):
    parts = [score("reap_sum", acts, domains=[domain]) for domain in acts.domains]
    whole = score("reap_sum", acts)
    assert np.allclose(sum(one.values for one in parts), whole.values)
    assert (sum(one.counts for one in parts) == whole.counts).all()
    both = score("reap_sum", acts, domains=",".join(acts.domains))
    assert np.allclose(both.values, whole.values)
    made = blend(parts)
    assert made.settings["of"] == list(acts.domains)
    assert made.activations == acts.digest()


def test_domains_that_cannot_be_scored(acts):
    with pytest.raises(SettingsError, match="domain is 'lew'"):
        score("frequency", acts, domains="lew")
    with pytest.raises(SettingsError, match="left out: shapley reads more than sums"):
        score("shapley", acts, domains=list(acts.domains))
    with pytest.raises(SettingsError, match="some of those that were recorded"):
        score("frequency", acts, domains=" ")
