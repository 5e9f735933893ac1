"""Criteria that read parameters, beside what a saved checkpoint says of every expert."""

import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import models
import moecollab as mc
import zoo
from moecollab.criteria.base import Evidence
from moecollab.criteria.scoring import score
from moecollab.criteria.weights import aimer
from moecollab.errors import MissingInputError, UnsupportedModelError
from moecollab.models.keep import Keep
from moecollab.models.layout import Layout
from moecollab.models.loading import load_model
from moecollab.models.masked import Mask
from moecollab.models.registry import register_layout, unregister_layout
from moecollab.models.routing import find_moe_layers
from moecollab.models.weight_statistics import entry_sums, largest_singular
from moecollab.models.weights import ExpertWeights, expert_matrices
from moecollab.record.tallies import Tallies

NAMES = ("aimer", "weight_norm", "router_norm", "stable_rank", "ews")
FAMILIES = ("qwen2_moe", "mixtral", "deepseek_v3", "olmoe")


def stored_experts(folder):
    """Matrices of every (layer, expert) in a checkpoint that keeps them apart."""
    found = {}
    for name, value in sorted(load_file(folder / "model.safetensors").items()):
        place = re.search(r"layers\.(\d+)\..*experts\.(\d+)\.", name)
        if place is not None and "shared" not in name:
            found.setdefault((int(place[1]), int(place[2])), []).append(value.astype(np.float64))
    return found


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    return models.save(request.param, tmp_path / request.param)


def test_a_checkpoint_and_a_model_say_what_is_stored(folder):
    """gate and up are joined in the model, which no sum over entries can tell."""
    stored = stored_experts(folder)
    layers = sorted({layer for layer, _ in stored})
    flat = {at: np.concatenate([one.ravel() for one in own]) for at, own in stored.items()}
    norm = np.array([[np.linalg.norm(flat[at, e]) for e in range(8)] for at in layers])
    mean = np.array([[abs(flat[at, e]).mean() for e in range(8)] for at in layers])
    n_entries = len(flat[layers[0], 0])
    cosines = np.zeros(norm.shape)
    for row, at in enumerate(layers):
        unit = np.stack([flat[at, e] / norm[row, e] for e in range(8)])
        cosines[row] = (unit @ unit.T).sum(axis=1) - 1
    expected = {
        "weight_norm": norm,
        "aimer": -mean / (norm / n_entries**0.5),
        "ews": -cosines,
    }
    for name, values in expected.items():
        found = score(name, model=folder)
        assert found.layers == tuple(layers), name
        np.testing.assert_allclose(found.values, values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_files_and_a_loaded_model_agree(name, folder):
    loaded, _ = load_model(folder)
    first, second = (score(name, model=given).values for given in (folder, loaded))
    assert first.tobytes() == second.tobytes()


def test_router_norm_and_stable_rank_by_hand():
    model = models.build("qwen2_moe")
    layer = find_moe_layers(model)[1]
    with torch.no_grad():
        layer.router.weight[2] = 0
        layer.router.weight[2, 0] = 3
        joined, down = layer.experts.gate_up_proj[5], layer.experts.down_proj[5]
        joined.zero_()[0, 0], joined[1, 1], joined[2, 2] = 4, 4, 2  # Σσ² / σ₁² = 36 / 16
        down.zero_()[0, 0] = 0.5  # rank 1
    assert score("router_norm", model=model).values[1, 2] == -3
    assert score("stable_rank", model=model).values[1, 5] == pytest.approx(-(36 / 16 + 1) / 2)


def test_all_zero_experts_are_defined():
    model = models.build("qwen2_moe")
    layer = find_moe_layers(model)[0]
    with torch.no_grad():
        layer.experts.gate_up_proj[3].zero_()
        layer.experts.down_proj[3].zero_()
    found = {name: score(name, model=model).values[0, 3] for name in NAMES}
    assert (found["aimer"], found["weight_norm"], found["stable_rank"]) == (-1, 0, 0)
    assert found["ews"] == pytest.approx(0)
    assert (score("aimer", model=model).values >= -1).all()


def test_aimer_keeps_the_expert_whose_weights_are_uneven():
    """Σ|w| / √(n Σw²) is 1 for equal weights, less the fewer hold most of them."""
    model = models.build("qwen2_moe")
    layer = find_moe_layers(model)[0]
    with torch.no_grad():
        for tensor in (layer.experts.gate_up_proj, layer.experts.down_proj):
            tensor[0] = 1.0
            tensor[1] = 0.0
            tensor[1].reshape(-1)[::4] = 7.0
    found = score("aimer", model=model).values[0]
    np.testing.assert_allclose(found[:2], [-1, -0.5], rtol=1e-6)


LAYOUTS = ("gpt_oss", "dbrx", "jetmoe", "llama4_text", "granitemoe", "nemotron_h", "zaya")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_way_of_storing_experts(name):
    """What experts' matrices hold is what the container holds, without biases."""
    if zoo.missing(name):
        pytest.skip(zoo.missing(name))
    model = zoo.build(name)
    for criterion in NAMES:
        assert np.isfinite(score(criterion, model=model).values).all()
    for layer in find_moe_layers(model):
        held = [
            value.detach().double().square().sum()
            for path, value in layer.experts.named_parameters()
            if "bias" not in path and "router" not in path and value.dim() > 1
        ]
        assert entry_sums(layer)[:, 1].sum() == pytest.approx(float(sum(held)), rel=1e-6)
        assert len(expert_matrices(layer)) == layer.n_experts


@pytest.fixture
def looped():
    """A model whose experts are a list of modules."""
    from test_remote import ours

    register_layout(Layout(family="small_moe", count="n_routed_experts", capture="modules"))
    yield models.randomised(ours.SmallMoeForCausalLM(ours.SmallMoeConfig()), 0)
    unregister_layout("small_moe")


def test_experts_that_are_modules(looped):
    found = score("weight_norm", model=looped).values
    for row, layer in enumerate(find_moe_layers(looped)):
        for number, expert in enumerate(layer.experts):
            flat = torch.cat([value.reshape(-1) for value in expert.parameters()])
            assert found[row, number] == pytest.approx(float(flat.detach().norm()), rel=1e-6)


def test_masked_models_are_refused(folder, tmp_path):
    kept = {layer.layer: tuple(range(6)) for layer in ExpertWeights(folder).layers}
    plan = mc.Plan(keep=kept, n_experts=8, top_k=2, criterion="x", drop=0.25, per="layer")
    mc.mask(folder, plan, out=tmp_path / "masked")
    with pytest.raises(UnsupportedModelError, match="is a masked model, whose routers lack rows"):
        score("router_norm", model=tmp_path / "masked")
    model, kept = models.build("qwen2_moe"), Keep(dict.fromkeys(range(3), (0, 1, 2)), 8, 2)
    message = "layer 0 has 3 rows for 8 experts"
    with Mask(model, kept), pytest.raises(UnsupportedModelError, match=message):
        score("router_norm", model=model)
    assert score("router_norm", model=model).values.shape == (3, 8)


def test_quantised_weights_are_refused():
    model = models.build("qwen2_moe")
    experts = find_moe_layers(model)[0].experts
    quantised = experts.down_proj.detach().to(torch.int8)
    experts.down_proj = torch.nn.Parameter(quantised, requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="hold no matrices of floating point"):
        score("aimer", model=model)


@pytest.mark.parametrize("shape", [(1, 7), (40, 3), (64, 50), (300, 200), (200, 300)])
def test_largest_singular_value(shape):
    draw = torch.Generator().manual_seed(sum(shape))
    matrix = torch.randn(shape, generator=draw)
    exact = float(torch.linalg.svdvals(matrix.double())[0])
    assert largest_singular(matrix) == pytest.approx(exact, rel=1e-5)
    assert largest_singular(torch.zeros(shape)) == 0
    assert largest_singular(torch.ones(shape)) == pytest.approx((shape[0] * shape[1]) ** 0.5)


def test_function_says_what_it_lacks():
    bare = Evidence(tallies=Tallies.zeros(("a",), 1, 2).total(), top_k=1)
    with pytest.raises(MissingInputError, match="parameters are needed; pass the model"):
        aimer(bare)
