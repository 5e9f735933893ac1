"""What every registered criterion owes."""

import pickle

import numpy as np
import pytest

from moecollab import criteria
from moecollab.criteria.base import FORM, Criterion, Evidence, Needs
from moecollab.criteria.scoring import score
from moecollab.errors import (
    MissingInputError,
    OutputExistsError,
    SettingsError,
    ShapeError,
    StaleInputError,
)

NAMES = criteria.names()
MEANS = ("esft_gate", "esft_token", "reap")
"""Criteria that are means over tokens."""


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def scored(name, acts, request):
    """Scores by this criterion, with patterns if it wants them."""
    return lambda of=acts, **settings: score(
        name, of, collaboration=_patterns(name, of, request), **settings
    )


def _patterns(name, acts, request):
    if Needs.COLLABORATION not in criteria.get(name).needs:
        return None
    return request.getfixturevalue("fitted")(acts)


def test_scores_are_finite_float64_of_every_expert(scored, name, acts):
    found = scored()
    assert found.values.dtype == np.float64
    assert found.values.shape == (2, 6)
    assert np.isfinite(found.values).all()
    assert (found.criterion, found.layers, found.top_k) == (name, (1, 3), 2)
    assert found.activations == acts.digest()


def test_counts_are_those_of_the_table(scored, acts):
    found = scored()
    for row, layer in enumerate(acts.layers):
        expert = acts.layer(layer).expert
        assert found.counts[row].tolist() == np.bincount(expert.ravel(), minlength=6).tolist()


def test_scores_are_deterministic(scored):
    first, second = scored(), scored()
    assert first.values.tobytes() == second.values.tobytes()


def test_an_expert_that_is_never_routed_is_scored_lowest(scored, name, collaboration):
    found = scored()
    assert (found.counts[:, 5] == 0).all()
    if name == "random":
        assert np.isfinite(found.values[:, 5]).all()
    elif name == "caep":
        in_no_pattern = collaboration.levels[0].usage @ collaboration.levels[0].atoms == 0
        assert in_no_pattern.reshape(found.values.shape)[:, 5].all()
        assert (found.values[:, 5] < in_no_pattern.sum()).all()
    else:
        assert (found.values[:, 5] == found.values.min(axis=1)).all()


def test_relabelled_experts_get_relabelled_scores(scored, name, recorded, tmp_path):
    if name in ("random", "caep"):
        pytest.skip("draws by position" if name == "random" else "see test_caep, up to ties")
    order = [3, 5, 0, 1, 4, 2]
    other = scored(recorded.relabelled(order).save(tmp_path / "other"))
    np.testing.assert_allclose(other.values, scored().values[:, order], rtol=1e-12)


def test_cutting_the_table_into_batches_changes_nothing(name, recorded, collaboration):
    n_tokens = recorded.expert.shape[1]
    whole = recorded.tallies()
    cut = np.random.default_rng(0).permutation(n_tokens)
    parts = [recorded.part(cut[i::3]).tallies() for i in range(3)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    first, second = (
        criteria.get(name).function(
            Evidence(tallies=tallies.total(), top_k=2, collaboration=collaboration)
        )
        for tallies in (whole, merged)
    )
    np.testing.assert_allclose(first, second, rtol=1e-12)


@pytest.mark.parametrize("name", MEANS)
def test_doubling_the_corpus_changes_no_mean(name, recorded):
    tallies = recorded.tallies()
    function = criteria.get(name).function
    once, twice = (
        function(Evidence(tallies=found.total(), top_k=2))
        for found in (tallies, tallies.merge(tallies))
    )
    np.testing.assert_allclose(once, twice, rtol=1e-12)


def test_missing_needs_raise_before_any_work(name, bare_acts, acts, monkeypatch):
    needs = criteria.get(name).needs

    def worked(_self):
        raise AssertionError("read the tallies before checking needs")

    monkeypatch.setattr(type(acts), "tallies", worked)
    if Needs.OUTPUT_NORMS in needs:
        with pytest.raises(MissingInputError, match=r"needs output norms.*extract again with nor"):
            score(name, bare_acts)
    if Needs.COLLABORATION in needs:
        with pytest.raises(MissingInputError, match=r"needs collaboration.*pass collaboration="):
            score(name, acts)


def test_criterion_survives_pickle(name):
    found = criteria.get(name)
    assert pickle.loads(pickle.dumps(found)) == found


def test_docstring_has_every_line_of_the_form(name):
    form = criteria.get(name).form
    assert [line for line in form if line != "summary"] == list(FORM)
    assert all(form.values())
    assert len(form["summary"]) < 80
    assert form["direction"] == "higher is kept"


def test_docstring_names_the_needs(name):
    found = criteria.get(name)
    words = [str(need.name).lower().replace("_", " ") for need in found.needs]
    assert found.form["needs"] == (", ".join(words) or "nothing")
    assert found.summary.startswith(f"{name} · needs ")


def test_names_are_sorted_and_lower_case():
    assert list(NAMES) == sorted(NAMES)
    assert all(name == name.lower() for name in NAMES)
    assert set(NAMES) >= {"caep", "frequency", "gate_sum", "random", "reap"}


def test_unknown_name_suggests_near_ones(acts):
    with pytest.raises(SettingsError, match=r"criterion is 'freqency'.*did you mean frequency\?"):
        score("freqency", acts)


def test_registry_refuses_a_name_twice():
    with pytest.raises(SettingsError, match="'reap'; it must be a name that is not yet"):
        criteria.register(criteria.get("reap"))


def test_a_registered_criterion_is_scored(acts, monkeypatch):
    monkeypatch.setattr(criteria, "_registry", dict(criteria._registry))
    criteria.register(Criterion("constant", Needs.NOTHING, lambda e: np.ones(e.shape)))
    assert (score("constant", acts).values == 1).all()
    criteria.register(Criterion("flat", Needs.NOTHING, lambda e: np.ones(12)))
    with pytest.raises(ShapeError, match=r"'flat' gave float64 \(12,\), expected float64 \(2, 6\)"):
        score("flat", acts)


def test_wrong_settings(acts):
    with pytest.raises(SettingsError, match=r"drop is 1; it must be in \[0, 1\)"):
        score("reap", acts, drop=1)
    with pytest.raises(SettingsError, match="seed is -1; it must be at least 0"):
        score("random", acts, seed=-1)


def test_patterns_of_other_activations_are_stale(acts, bare_acts, collaboration, tmp_path):
    collaboration.save(tmp_path / "collaboration")
    for given in (collaboration, tmp_path / "collaboration"):
        assert score("caep", acts, collaboration=given).n_sites == 12
        with pytest.raises(StaleInputError, match=r"was fitted on activations .* fit it again"):
            score("caep", bare_acts, collaboration=given)


def test_score_reads_and_writes_files(acts, tmp_path):
    out = tmp_path / "scores.parquet"
    found = score("frequency", acts.path, out=out)
    assert out.exists()
    with pytest.raises(OutputExistsError, match="exists"):
        score("frequency", acts.path, out=out)
    assert score("frequency", acts, out=out, overwrite=True).values.tolist() == (
        found.values.tolist()
    )
