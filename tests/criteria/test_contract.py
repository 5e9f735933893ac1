"""What every registered criterion owes."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest

import models
from moecollab import criteria
from moecollab.criteria import listing
from moecollab.criteria.base import FORM, Criterion, Evidence, Needs
from moecollab.criteria.scoring import score
from moecollab.errors import (
    DataError,
    MissingInputError,
    OutputExistsError,
    SettingsError,
    ShapeError,
    StaleInputError,
)
from moecollab.models.routing import find_moe_layers
from moecollab.models.slicing import slice_experts, slice_router
from moecollab.pruning.resampling import uncertainty

NAMES = criteria.names()
MEANS = ("esft_gate", "esft_token", "gate_mean", "reap", "ean_mean", "msan", "mean_output_norm")
"""Criteria that are means over tokens."""

UNCHANGED = (
    *MEANS,
    "max_activation",
    "evtc",
    "ecc",
    "ets",
    "eae",
    "easy_ep_mixed",
    "ranked_choice",
)
"""Criteria that a text read twice does not change."""

TWICE = (
    "frequency",
    "gate_sum",
    "soft_routing",
    "ean_sum",
    "reap_sum",
    "easy_ep",
    "shapley",
    "coverage",
    "output_coverage",
)
"""Criteria that a text read twice doubles."""

NOT_RECORDED = tuple(
    name for name in NAMES if not criteria.get(name).needs & ~(Needs.WEIGHTS | Needs.MODEL)
)
"""Criteria that read a model, or nothing."""

RANKED = ("caep", "caep_composed", "ecc", "ets", "naee", "ranked_choice")
"""Criteria that order experts, of equals by id."""

OF_SUMS = tuple(
    name
    for name in NAMES
    if not criteria.get(name).needs & (Needs.TOKENS | Needs.WEIGHTS | Needs.MODEL)
)
"""Criteria that read sums and patterns alone."""


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_scores_are_finite_float64_of_every_expert(scored, name, acts):
    found = scored(name)
    assert found.values.dtype == np.float64
    assert found.values.shape == (2, 6)
    assert np.isfinite(found.values).all()
    assert (found.criterion, found.layers, found.top_k) == (name, (1, 3), 2)
    assert found.activations == acts.digest()


def test_counts_are_those_of_the_table(scored, name, acts):
    found = scored(name)
    for row, layer in enumerate(acts.layers):
        expert = acts.layer(layer).expert
        assert found.counts[row].tolist() == np.bincount(expert.ravel(), minlength=6).tolist()


def test_scores_are_deterministic(scored, name):
    first, second = scored(name), scored(name)
    assert first.values.tobytes() == second.values.tobytes()


def test_an_expert_that_is_never_routed_is_scored_lowest_and_reported(scored, name, collaboration):
    found = scored(name)
    assert found.unrouted == ((1, 5), (3, 5))
    if name in NOT_RECORDED:
        assert np.isfinite(found.values[:, 5]).all()
    elif name.startswith("caep"):
        level = collaboration.levels[-1 if name == "caep_composed" else 0]
        in_no_pattern = level.usage @ level.atoms == 0
        assert in_no_pattern.reshape(found.values.shape)[:, 5].all()
        assert (found.values[:, 5] < in_no_pattern.sum()).all()
    else:
        assert (found.values[:, 5] == found.values.min(axis=1)).all()


def test_relabelled_experts_get_relabelled_scores(scored, name, recorded, tmp_path):
    if name == "random" or name in RANKED:
        pytest.skip("draws by position" if name == "random" else "up to ties: see its own tests")
    order = [3, 5, 0, 1, 4, 2]
    other = recorded.relabelled(order).save(tmp_path / "other")
    found = scored(name, other, _relabelled_model(order))
    runs = Needs.MODEL in criteria.get(name).needs  # its sums over experts round by their order
    close = {"rtol": 1e-4, "atol": 1e-6} if runs else {"rtol": 1e-6, "atol": 1e-9}
    np.testing.assert_allclose(found.values, scored(name).values[:, order], **close)


def _relabelled_model(order):
    """The same model, with expert `order[i]` called `i`."""
    model = models.build("qwen2_moe", num_experts=6, num_hidden_layers=4, mlp_only_layers=[0, 2])
    for layer in find_moe_layers(model):
        slice_router(layer, order)
        slice_experts(layer, order)
    return model


def _by_sums(name, tallies, collaboration):
    evidence = Evidence(
        tallies=tallies.total(), by_domain=tallies, top_k=2, collaboration=collaboration
    )
    return criteria.get(name).function(evidence)


@pytest.mark.parametrize("name", OF_SUMS)
def test_cutting_the_table_into_batches_changes_nothing(name, recorded, collaboration):
    n_tokens = recorded.expert.shape[1]
    whole = recorded.tallies()
    cut = np.random.default_rng(0).permutation(n_tokens)
    parts = [recorded.part(cut[i::3]).tallies() for i in range(3)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    first, second = (_by_sums(name, tallies, collaboration) for tallies in (whole, merged))
    np.testing.assert_allclose(first, second, rtol=1e-12)


@pytest.mark.parametrize("name", ["shapley", "ranked_choice", "coverage"])
def test_order_of_tokens_changes_nothing(name, scored, recorded, tmp_path):
    """Within a sample, since samples are in order in a recording."""
    shuffled = np.lexsort((np.random.default_rng(0).random(len(recorded.sample)), recorded.sample))
    other = recorded.part(shuffled).save(tmp_path / "other")
    np.testing.assert_allclose(scored(name, other).values, scored(name).values, rtol=1e-12)


@pytest.mark.parametrize("name", [*UNCHANGED, *TWICE])
def test_text_read_twice(name, scored, recorded, tmp_path):
    n_tokens = recorded.expert.shape[1]
    twice = recorded.part(np.repeat(np.arange(n_tokens), 2)).save(tmp_path / "twice")
    factor = 2 if name in TWICE else 1
    np.testing.assert_allclose(scored(name, twice).values, factor * scored(name).values, rtol=1e-9)


RECORDED = Needs.ROUTING | Needs.ROUTING_WEIGHTS | Needs.TOKENS | Needs.DOMAINS
"""What every recording holds."""
MESSAGES = {
    Needs.OUTPUT_NORMS: "output norms.* extract again with norms=True",
    Needs.SHIFT: "shift.* extract again with collect='shift' .--collect shift.",
    Needs.CHANNELS: "channels.* extract again with collect='channels'",
    Needs.PROBABILITY: "probability.* extract again with collect='probability'",
    Needs.PAIRS: "pairs.* extract again with collect='pairs'",
    Needs.VOCABULARY: "vocabulary.* extract again with collect='vocabulary'",
    Needs.PREFERENCES: "preferences.* extract again with collect='preferences'",
    Needs.COLLABORATION: "collaboration.* pass collaboration=",
    Needs.WEIGHTS: "weights.* pass the model: model= .--model.",
    Needs.MODEL: "model.* pass the model and text: model=, corpus=",
}


def test_missing_needs_raise_before_any_work(name, bare_acts, monkeypatch):
    def worked(_self):
        raise AssertionError("read the tallies before checking needs")

    monkeypatch.setattr(type(bare_acts), "tallies", worked)
    for need in criteria.get(name).needs & ~RECORDED:
        with pytest.raises(MissingInputError, match=rf"needs .*{MESSAGES[need]}"):
            score(name, bare_acts)


def test_every_need_that_can_be_missing_is_tested():
    assert set(MESSAGES) == {need for need in Needs if need not in RECORDED}


def test_criterion_survives_pickle(name):
    found = criteria.get(name)
    assert pickle.loads(pickle.dumps(found)) == found


def test_docstring_has_every_line_of_the_form(name):
    form = criteria.get(name).form
    assert [line for line in form if line != "summary"] == list(FORM)
    assert all(form.values())
    assert len(form["summary"]) < 80
    assert form["direction"].split(";")[0] == "higher is kept"


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


def test_a_criterion_of_ones_own_takes_five_lines(acts, monkeypatch):
    """The example of docs/criteria.md."""
    monkeypatch.setattr(criteria, "_registry", dict(criteria._registry))
    source = (Path(__file__).parent / "register_busy_peak.py").read_text()
    code = [line for line in source.partition('"""\n\n')[2].splitlines() if line]
    assert len(code) == 5
    exec(source, {})
    found, tallies = score("busy_peak", acts), acts.tallies().total()
    assert (found.values == tallies["max_abs"] * tallies.count).all()
    assert criteria.collects("busy_peak") == ("routing", "norms")
    assert "busy_peak" in listing.listing()
    assert criteria.get("busy_peak").summary.endswith("· no source given")
    criteria.unregister("busy_peak")
    assert criteria.names() == NAMES


@pytest.mark.parametrize(
    ("name", "here"),
    [("MAN", "ean_mean"), ("EAN-CA", "mean_output_norm"), ("seer_hard", "frequency")],
)
def test_names_from_papers_are_told_apart(name, here, acts):
    with pytest.raises(SettingsError, match=f"it must be {here}, as it is called here"):
        score(name, acts)


def test_names_elsewhere_are_not_names_here():
    assert not set(criteria.KNOWN_AS) & set(NAMES)
    for here in criteria.KNOWN_AS.values():
        assert here.split()[0] in NAMES


def test_every_criterion_is_listed_once_under_what_it_reads():
    kinds = listing.kinds()
    assert sorted(name for held in kinds.values() for name in held) == list(NAMES)
    expected = {"random": "no data", "ecc": "routing", "mone": "outputs", "caep": "patterns"}
    assert {name: criteria.get(name).kind for name in expected} == expected
    text = listing.listing()
    for name in NAMES:
        assert text.count(f"\n  {name} ") == 1
    assert max(map(len, text.splitlines())) <= 100
    assert all(name in NAMES for name in re.findall(r"\w+_\w+|aimer|reap", listing.ADVICE))


def test_recorded_groups_answer_every_criterion(recorded):
    """`extract --collect NAME` records what NAME needs, and nothing else is missing."""
    everything = {"routing", "norms", *recorded.collect}
    for name in NAMES:
        assert set(criteria.collects(name)) <= everything
    assert criteria.collects("easy_ep", "mone") == ("routing", "shift", "channels")
    assert criteria.collects("ranked_choice") == ("preferences",)
    assert criteria.collects("aimer") == ()


def test_wrong_settings(acts):
    with pytest.raises(SettingsError, match="drop is 1; it must be a share between 0 and 1"):
        score("reap", acts, drop=1)
    with pytest.raises(SettingsError, match="seed is -1; it must be at least 0"):
        score("random", acts, seed=-1)


def test_patterns_of_other_activations_are_stale(acts, bare_acts, collaboration, tmp_path):
    collaboration.save(tmp_path / "collaboration")
    for given in (collaboration, tmp_path / "collaboration"):
        assert score("caep", acts, collaboration=given).n_sites == 12
        with pytest.raises(StaleInputError, match=r"was fitted on activations .* fit it again"):
            score("caep", bare_acts, collaboration=given)


def test_what_is_given_and_not_needed_is_looked_at(acts, bare_acts, collaboration, tmp_path):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(DataError, match="nowhere holds no collaboration"):
        score("reap", acts, collaboration=nowhere)
    with pytest.raises(DataError, match="nowhere holds no collaboration"):
        uncertainty("reap", acts, collaboration=[collaboration, nowhere], drop=0.25)
    with pytest.raises(StaleInputError, match="was fitted on activations"):
        score("frequency", bare_acts, collaboration=collaboration)
    with pytest.raises(DataError, match="nowhere does not exist"):
        score("reap", acts, model=nowhere)
    with pytest.raises(DataError, match=r"corpus .*nowhere does not exist"):
        score("reap", acts, corpus=nowhere)
    with pytest.raises(SettingsError, match=r"tokens is 5; it must be left out without corpus"):
        score("reap", acts, tokens=5)
    plain = score("reap", acts)
    assert score("reap", acts, collaboration=collaboration).values.tolist() == plain.values.tolist()


def test_score_reads_and_writes_files(acts, tmp_path):
    out = tmp_path / "scores.parquet"
    found = score("frequency", acts.path, out=out)
    assert out.exists()
    with pytest.raises(OutputExistsError, match="exists"):
        score("frequency", acts.path, out=out)
    assert score("frequency", acts, out=out, overwrite=True).values.tolist() == (
        found.values.tolist()
    )
