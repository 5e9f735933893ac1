"""Finding MoE layers in every family, and the errors for other models."""

import pytest
import torch
from torch import nn

import models
from moecollab.errors import DataError, SettingsError, UnsupportedModelError
from moecollab.models.capture import CAPTURES
from moecollab.models.keep import Keep
from moecollab.models.layout import BUILT_IN, CAPTURED, SCORED, Layout
from moecollab.models.masked import Mask
from moecollab.models.probability import SCORES
from moecollab.models.registry import families, register_layout, unregister_layout
from moecollab.models.routing import Call, find_moe_layers, takes_routing
from moecollab.pruning.pruning import prune
from moecollab.record.extraction import extract
from moecollab.record.recorder import Recorder


def test_layers_of_each_family(family):
    layers = find_moe_layers(models.build(family))
    dense_first = family in ("qwen3_moe", "deepseek_v3")
    assert [layer.layer for layer in layers] == ([1, 2] if dense_first else [0, 1, 2])
    assert {(layer.n_experts, layer.top_k) for layer in layers} == {(models.N_EXPERTS, 2)}
    assert all(takes_routing(layer.experts) for layer in layers)


def test_dense_model_has_its_own_error():
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is a dense model: it has no"):
        find_moe_layers(models.build_dense())


def test_known_family_without_moe_layers_is_dense():
    with pytest.raises(UnsupportedModelError, match="is a dense model"):
        find_moe_layers(models.build("qwen3_moe", mlp_only_layers=[0, 1, 2]))


def test_experts_that_are_called_otherwise_are_not_taken_for_a_dense_model():
    model = models.build("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList([nn.Linear(32, 32)])
    with pytest.raises(UnsupportedModelError, match="not called with ids and weights, as those of"):
        find_moe_layers(model)


def test_unknown_family_says_first_how_to_add_it_and_names_like_ones():
    model = models.build("mixtral")
    model.config.model_type = "deepseek_v9"
    with pytest.raises(UnsupportedModelError) as caught:
        find_moe_layers(model)
    message = str(caught.value)
    assert message.startswith("MixtralForCausalLM (model_type 'deepseek_v9') is of a Mixture-of-")
    assert message.index("register_layout") < message.index("(a like name: deepseek_v4")
    assert "docs/models.md" in message
    assert "moecollab.models.registry.families()" in message
    assert sum(family in message for family in families()) < 5
    model.config.model_type = "zzz"
    with pytest.raises(UnsupportedModelError, match="lists the known families, and so does"):
        find_moe_layers(model)


def compiled_in_part(how):
    model = models.build("mixtral")
    if how == "in place":
        model.compile(backend="eager")
    elif how == "a part":
        model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp, backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize("how", ["in place", "a part", "forward"])
def test_models_that_are_compiled_within_are_refused(how, texts, tokenizer, tmp_path):
    where = "model.layers.1.mlp" if how == "a part" else "the model"
    message = f"^{where} is compiled by torch.compile, .*leave out what compiles it"
    model = compiled_in_part(how)
    with pytest.raises(UnsupportedModelError, match=message):
        extract(model, texts, out=tmp_path / "acts", tokenizer=tokenizer)
    with pytest.raises(UnsupportedModelError, match=message):
        Mask(model, Keep({0: (0, 1), 1: (0, 1), 2: (0, 1)}, models.N_EXPERTS, 2))


def test_a_compiled_model_is_recorded_as_the_one_inside(texts, tokenizer, tmp_path):
    model = models.build("mixtral")
    kinds = {"plain": model, "compiled": torch.compile(model, backend="eager")}
    plain, compiled = (
        extract(one, texts, out=tmp_path / name, tokenizer=tokenizer) for name, one in kinds.items()
    )
    assert compiled.manifest["inputs"] == plain.manifest["inputs"]
    assert compiled.manifest["model"] == plain.manifest["model"]
    for one, other in zip(plain.layers, compiled.layers, strict=True):
        assert (plain.layer(one).norm == compiled.layer(other).norm).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"router": "router"}, "has no 'router', which the layout of 'my_moe' names as its router"),
        ({"top_k": "moe_k"}, "has no 'moe_k', which the layout of 'my_moe' names as its top_k"),
        ({"capture": "sorted"}, "are a ModuleList, which capture='sorted' cannot listen to; .*="),
        ({"capture": "scaled_input"}, "again with capture='modules'"),
    ],
)
def test_a_wrong_layout_of_a_list_gets_a_sentence(my_family, change, said):
    model = models.build("mixtral")
    model.config.model_type = "my_moe"
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(models.N_EXPERTS))
        del layer.mlp.gate.top_k
    right = {"count": "num_local_experts", "capture": "modules"}
    register_layout(Layout(family="my_moe", **right), replace=True)
    assert len(find_moe_layers(model)) == 3
    register_layout(Layout(family="my_moe", **(right | change)), replace=True)
    with pytest.raises(UnsupportedModelError, match=said):
        find_moe_layers(model)


def test_a_container_is_no_list_and_a_factor_must_be_there(my_family):
    model = models.build("mixtral")
    model.config.model_type = "my_moe"
    register_layout(
        Layout(family="my_moe", count="num_local_experts", capture="modules"), replace=True
    )
    with pytest.raises(UnsupportedModelError, match="again with another capture than 'modules'"):
        find_moe_layers(model)
    register_layout(
        Layout(family="my_moe", count="num_local_experts", scale="factor"), replace=True
    )
    with pytest.raises(UnsupportedModelError, match=r"has no 'factor', which .* as its scale"):
        _ = find_moe_layers(model)[0].scale


def test_module_without_a_config():
    with pytest.raises(DataError, match="Linear has no config; pass a transformers model"):
        find_moe_layers(nn.Linear(2, 2))


class ListedExperts(nn.ModuleList):
    """A container as a user's own model may have it: a list, called with the routing."""

    def forward(self, hidden, ids, weights):
        total = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            weight = (weights * (ids == number)).sum(dim=1, keepdim=True)
            total = total + weight * expert(hidden)
        return total


def listed_model():
    model = models.build("mixtral")
    model.config.model_type = "my_moe"
    torch.manual_seed(5)
    for layer in model.model.layers:
        layer.mlp.experts = ListedExperts(nn.Linear(32, 32) for _ in range(models.N_EXPERTS))
    return model


@pytest.fixture
def my_family():
    listed = {"count": "num_local_experts", "rows": ("gate.weight",), "capture": "expanded"}
    register_layout(Layout(family="my_moe", **listed))
    yield
    unregister_layout("my_moe")


def test_user_family_with_a_list_of_experts(my_family, token_ids, logits):
    model = listed_model()
    full = logits(model, token_ids)
    layers = find_moe_layers(model)
    with Recorder(layers, norms=True) as recorder:
        torch.testing.assert_close(logits(model, token_ids), full, rtol=0, atol=1e-5)
        recorder.take(torch.ones(24, dtype=torch.bool))
    keep = Keep({layer.layer: (0, 2, 3, 7) for layer in layers}, models.N_EXPERTS, 2)
    with Mask(model, keep):
        masked = logits(model, token_ids)
    kept = model.model.layers[0].mlp.experts[7]
    prune(model, keep)
    assert model.model.layers[0].mlp.experts[3] is kept
    assert torch.equal(logits(model, token_ids), masked)
    assert not torch.equal(masked, full)


def test_experts_that_are_weighted_by_masks_say_how_they_can_be_read(my_family, token_ids):
    listed = {"count": "num_local_experts", "rows": ("gate.weight",)}
    register_layout(Layout(family="my_moe", **listed), replace=True)
    model = listed_model()
    layers = find_moe_layers(model)
    with torch.inference_mode(), Recorder(layers, norms=False):
        model(input_ids=token_ids)
    message = "register the layout again with capture='expanded'"
    with (
        torch.inference_mode(),
        pytest.raises(UnsupportedModelError, match=message),
        Recorder(layers, norms=True),
    ):
        model(input_ids=token_ids)


class ScaledExperts(nn.ModuleList):
    """A container that multiplies the inputs of its experts, not their outputs."""

    def forward(self, hidden, ids, weights):
        total = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            token, slot = torch.where(ids == number)
            total.index_add_(0, token, expert(hidden[token] * weights[token, slot, None]))
        return total


def test_inputs_are_not_taken_for_outputs(my_family, token_ids):
    listed = {"count": "num_local_experts", "rows": ("gate.weight",)}
    register_layout(Layout(family="my_moe", **listed), replace=True)
    model = listed_model()
    for layer in model.model.layers:
        layer.mlp.experts = ScaledExperts(layer.mlp.experts)
    with (
        torch.inference_mode(),
        pytest.raises(UnsupportedModelError, match="do not multiply their outputs"),
        Recorder(find_moe_layers(model), norms=True),
    ):
        model(input_ids=token_ids)


def test_ways_of_listening_and_scores_are_known_by_name():
    assert set(CAPTURES) == set(CAPTURED)
    assert set(SCORES) == set(SCORED)
    for odd in ({"capture": "nope"}, {"scoring": "nope"}):
        with pytest.raises(SettingsError, match="is 'nope'; it must be one of"):
            Layout(family="my_moe", count="num_experts", **odd)


def test_registering_twice(my_family):
    with pytest.raises(SettingsError, match="a family without a layout, or pass replace=True"):
        register_layout(Layout(family="my_moe", count="num_experts"))
    register_layout(Layout(family="my_moe", count="num_experts"), replace=True)


def test_unregistering_brings_the_built_in_back():
    register_layout(Layout(family="mixtral", count="other"), replace=True)
    unregister_layout("mixtral")
    assert find_moe_layers(models.build("mixtral"))[0].layout is BUILT_IN["mixtral"]


def test_layout_without_a_count():
    with pytest.raises(SettingsError, match="count is ''; it must be given in a layout"):
        Layout(family="x", count="")


def test_arguments_are_told_apart_by_dtype():
    hidden, ids, weights = torch.ones(3, 4), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    call = Call.read((hidden,), {"routing_weights": weights, "router_indices": ids})
    assert call.hidden is hidden
    assert call.ids is ids
    assert call.weights is weights
    other = call.with_values(None, ids + 1, None)
    assert other.kwargs["router_indices"].unique().item() == 1
    assert call.kwargs["router_indices"] is ids


def test_call_without_ids():
    with pytest.raises(UnsupportedModelError, match="0 integer and 2 floating tensors"):
        Call.read((torch.ones(2, 2), torch.ones(2, 2)), {})
