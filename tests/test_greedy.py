"""What a pruned model writes, its likeliest token each time: with a cache, without, and masked."""

import pytest
import torch

import zoo
from moecollab.models.groups import router_groups
from moecollab.models.keep import Keep
from moecollab.models.masked import Mask
from moecollab.models.routing import find_moe_layers
from moecollab.pruning.pruning import prune
from test_families import SPREAD

TOLD = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

pytestmark = pytest.mark.filterwarnings("ignore")


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        chosen = zoo.ZOO if metafunc.config.getoption("--all-families") else SPREAD
        metafunc.parametrize("name", chosen)


def writer(name):
    """A model that writes, and can be cut."""
    if zoo.missing(name):
        pytest.skip(zoo.missing(name))
    model = zoo.build(name)
    layout = find_moe_layers(model)[0].layout
    if layout.fixed or layout.uncut or not model.can_generate():
        pytest.skip("it cannot be cut, or writes nothing")
    return model


def half(model):
    """A plan that leaves five experts, or of each router group as many."""
    layers = find_moe_layers(model)
    n_groups = max(getattr(router_groups(layer), "count", 1) for layer in layers)
    kept = {1: (0, 2, 3, 5, 6), 2: (0, 2, 3, 4, 6, 7)}.get(n_groups, (0, 1, 2, 3, 4, 5, 6, 7))
    return Keep({layer.layer: kept for layer in layers}, 8, layers[0].top_k)


def written(model, *, cache):
    """Tokens after two prompts of five, (2, 12)."""
    ids = zoo.batch()["input_ids"][:, :5]
    with torch.inference_mode():
        return model.generate(ids, use_cache=cache, **TOLD)[:, 5:]


def test_greedy_tokens_are_those_of_the_mask_with_and_without_a_cache(name):
    model = writer(name)
    keep = half(model)
    with Mask(model, keep):
        masked = [written(model, cache=cache) for cache in (False, True)]
    prune(model, keep)
    pruned = [written(model, cache=cache) for cache in (False, True)]
    assert masked[0].shape == (2, 12)
    for found in (*masked, *pruned):
        assert torch.equal(found, masked[0])
