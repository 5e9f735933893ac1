"""Every criterion on layers of 6 and 5 experts scores those that are there, and no others."""

import numpy as np
import pytest
from test_contract import RANKED

import models
from conftest import WINDOWS
from moecollab import criteria
from moecollab.criteria.base import Needs
from moecollab.criteria.scoring import score
from moecollab.manifest import MANIFEST, read_json, write_json
from moecollab.models.routing import find_moe_layers
from moecollab.models.slicing import slice_experts, slice_router
from moecollab.record.activations import load_activations

NAMES = criteria.names()
OF_MODELS = [name for name in NAMES if Needs.MODEL in criteria.get(name).needs]
RECORDED = [
    name
    for name in NAMES
    if not criteria.get(name).needs & (Needs.MODEL | Needs.WEIGHTS) and name != "random"
]
COUNTS = (6, 5)


def narrowed(recorded, folder):
    """The recording as of a model whose second layer lacks expert 5, which nobody chose."""
    recorded.save(folder)
    about = read_json(folder / MANIFEST)
    about["model"]["experts_per_layer"] = list(COUNTS)
    write_json(folder / MANIFEST, about, overwrite=True)
    return load_activations(folder)


def without_last(recorded):
    """The recording as of a model none of whose layers has expert 5."""
    assert (recorded.next[..., -1] == 5).all()
    fewer = {"probability": recorded.probability[..., :5], "next": recorded.next[..., :-1]}
    return recorded.changed(n_experts=5, **fewer)


@pytest.mark.parametrize("name", RECORDED)
def test_layers_are_scored_as_in_models_of_one_width(name, recorded, scored, tmp_path):
    found = scored(name, narrowed(recorded, tmp_path / "uneven"))
    wide = scored(name, recorded.save(tmp_path / "wide"))
    narrow = scored(name, without_last(recorded).save(tmp_path / "narrow"))
    assert found.experts_per_layer == COUNTS
    assert found.values[1, 5] == 0
    assert found.unrouted == ((1, 5),)
    if name.startswith("caep"):  # ranks of all experts of the model
        order = np.argsort(wide.values[wide.present & found.present])
        assert (np.argsort(found.values[found.present]) == order).all()
        return
    np.testing.assert_allclose(found.values[0], wide.values[0], rtol=1e-9)
    np.testing.assert_allclose(found.values[1, :5], narrow.values[1], rtol=1e-9)


def small(order=None):
    """A model with 6 experts in layer 1, and in layer 3 five of them, in some order."""
    model = models.build("qwen2_moe", num_experts=6, num_hidden_layers=4, mlp_only_layers=[0, 2])
    layer = find_moe_layers(model)[1]
    slice_router(layer, order or range(5))
    slice_experts(layer, order or range(5))
    return model


@pytest.mark.parametrize("name", OF_MODELS)
def test_criteria_that_run_a_model(name):
    order = [3, 0, 4, 2, 1]
    found, other = (
        score(name, model=model, corpus=list(WINDOWS)).values for model in (small(), small(order))
    )
    assert np.ptp(found[0]) > 0
    assert np.ptp(found[1, :5]) > 0
    assert found[1, 5] == 0
    if name not in RANKED:
        np.testing.assert_allclose(other[0], found[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(other[1, :5], found[1, order], rtol=1e-4, atol=1e-6)
