"""What criteria are handed: sums by domain, the recording, parameters, a model and text."""

import numpy as np
import pytest

import models
from moecollab import criteria
from moecollab.criteria.base import Criterion, Needs
from moecollab.criteria.scoring import score
from moecollab.errors import MissingInputError, SettingsError, ShapeError
from moecollab.models.routing import find_moe_layers
from moecollab.models.slicing import slice_experts, slice_router
from moecollab.record.extraction import extract

SHAPE = (3, 8)  # of models.build("qwen2_moe")


@pytest.fixture
def seen(monkeypatch):
    """A criterion of any needs, and the evidence it was handed."""
    monkeypatch.setattr(criteria, "_registry", dict(criteria._registry))
    found = []

    def register(needs):
        def function(evidence):
            found.append(evidence)
            return np.zeros(evidence.shape)

        criteria.register(Criterion("watch", needs, function))
        return found

    return register


@pytest.fixture(scope="module")
def model():
    """Other layers than those that were recorded."""
    return models.build("qwen2_moe")


def test_sums_by_domain_add_up_to_the_total(seen, acts):
    found = seen(Needs.ROUTING | Needs.TOKENS)
    score("watch", acts)
    by_domain = found[0].by_domain
    assert by_domain.domains == ("law", "maths")
    assert (by_domain.count.sum(axis=0) == found[0].tallies.count).all()
    assert found[0].activations is acts


def test_a_model_alone_says_how_many_experts_there_are(seen, model, model_folder):
    found = seen(Needs.WEIGHTS)
    for given in (model, model_folder, str(model_folder)):
        scores = score("watch", model=given)
        assert (scores.values.shape, scores.layers, scores.top_k) == (SHAPE, (0, 1, 2), 2)
        assert scores.activations is None
        assert scores.unrouted == ()
        sizes = found[-1].weights.each(lambda layer: np.full(layer.n_experts, layer.layer))
        assert sizes.tolist() == [[0.0] * 8, [1.0] * 8, [2.0] * 8]
    assert score("random", model=model).values.shape == SHAPE


def test_nothing_at_all_is_an_error():
    with pytest.raises(MissingInputError, match=r"pass activations, or the model"):
        score("random")
    with pytest.raises(MissingInputError, match=r"needs routing, which is not there; extract act"):
        score("frequency")


def test_parameters_and_runs_need_a_model(seen, acts, model):
    seen(Needs.WEIGHTS)
    with pytest.raises(MissingInputError, match=r"needs weights.*pass the model: model= \(--model"):
        score("watch", acts)
    with pytest.raises(ShapeError, match=r"the model has 3 MoE layers × 8 .* are of 2 × 6, top 2"):
        score("watch", acts, model=model)


def test_runs_get_windows_of_the_text(seen, model, model_folder, texts):
    found = seen(Needs.MODEL)
    with pytest.raises(MissingInputError, match=r"needs model.*model=, corpus= \(--model, --corp"):
        score("watch", model=model)
    scores = score("watch", model=model_folder, corpus=texts)
    probe = found[0].probe
    assert all(window.dtype == np.int64 and 0 < len(window) <= 64 for window in probe)
    n_tokens = sum(len(text["text"].encode()) for text in texts)
    assert sum(map(len, probe)) == scores.settings["tokens"] == n_tokens
    assert not found[0].model.training
    score("watch", model=model_folder, corpus=texts, tokens=50)
    assert sum(map(len, found[1].probe)) == 50
    with pytest.raises(SettingsError, match="arrays of token ids for a model without a tokenizer"):
        score("watch", model=model, corpus=texts)
    score("watch", model=model, corpus=[np.array([3, 4, 5]), np.array([6], np.uint32)])
    assert [window.tolist() for window in found[2].probe] == [[3, 4, 5], [6]]
    assert found[2].model is model


def test_tokens_need_single_tokens(seen, acts):
    seen(Needs.TOKENS)
    assert score("watch", acts).n_sites == 12


def test_a_recording_names_layers_of_different_sizes(tmp_path, texts, tokenizer):
    """Cut by hand, as no family of transformers is built so."""
    model = models.build("qwen2_moe")
    layer = find_moe_layers(model)[1]
    slice_router(layer, range(6))
    slice_experts(layer, range(6))
    found = extract(model, texts, out=tmp_path / "acts", tokenizer=tokenizer)
    assert found.experts_per_layer == (8, 6, 8)
    scores = score("frequency", found, model=model)
    assert (scores.n_sites, scores.table().height) == (22, 22)
    assert (scores.values == found.tallies().total().count).all()
    with pytest.raises(ShapeError, match="give the model that was recorded"):
        score("weight_norm", found, model=models.build("qwen2_moe"))


def test_one_pass_of_a_real_model_answers_every_criterion(model_folder, texts, tmp_path, fitted):
    names = [name for name in criteria.names() if not criteria.get(name).needs & Needs.MODEL]
    collect = [group for group in criteria.collects(*names) if group not in ("routing", "norms")]
    found = extract(model_folder, texts, out=tmp_path / "acts", collect=collect)
    patterns = fitted(found)
    counts = found.tallies().total().count
    for name in names:
        scores = score(name, found, model=model_folder, collaboration=patterns)
        assert scores.values.shape == SHAPE, name
        assert (scores.counts == counts).all(), name
        assert np.ptp(scores.values) > 0, name


@pytest.mark.parametrize("tokens", [0, -1])
def test_wrong_limits(acts, tokens):
    with pytest.raises(SettingsError, match=f"tokens is {tokens}; it must be 1 or more"):
        score("frequency", acts, tokens=tokens)
