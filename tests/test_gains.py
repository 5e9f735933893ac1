"""Factors on experts' outputs equal the block by hand, and come off without a trace."""

import copy
import random

import numpy as np
import pytest
import torch

import models
import zoo
from expert_twin import one_expert
from moecollab import evaluate
from moecollab.errors import PlanError, SettingsError, ShapeError, UnsupportedModelError
from moecollab.evaluation.subject import open_subject
from moecollab.models.gains import Blocked, Gains
from moecollab.models.keep import Keep
from moecollab.models.masked import Mask
from moecollab.models.masking import amplify, mask
from moecollab.models.registry import unregister_layout
from moecollab.models.routing import find_moe_layers, text_config
from moecollab.pruning.pruning import prune
from test_families import IMPLEMENTATIONS, SPREAD, listened, spied
from test_remote import load, registers, save

pytestmark = pytest.mark.filterwarnings("ignore")

KEPT = (0, 2, 5, 7)  # fewer than some routers choose, and unequal numbers of their groups


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        chosen = zoo.ZOO if metafunc.config.getoption("--all-families") else SPREAD
        metafunc.parametrize("name", chosen)


@pytest.fixture
def model(name):
    if zoo.missing(name):
        pytest.skip(zoo.missing(name))
    return zoo.build(name)


def keeping(layers, kept=KEPT):
    return Keep({layer.layer: kept for layer in layers}, layers[0].n_experts, layers[0].top_k)


def by_hand(layer, config, hidden, heard, factors, renormalise=False):
    """What a layer's experts add, token by token and slot by slot, and the tokens with none."""
    total, lost = torch.zeros_like(hidden), 0
    for token, row in enumerate(hidden):
        slots = list(zip(heard.ids[token].tolist(), heard.weights[token].tolist(), strict=True))
        new = [weight * (factors[i] if i < len(factors) else 1.0) for i, weight in slots]
        before, after = sum(weight for _, weight in slots), sum(new)
        lost += any(weight for _, weight in slots) and not any(new)
        for (expert, weight), scaled in zip(slots, new, strict=True):
            if not scaled:
                continue
            part = scaled * (before / after if renormalise else 1.0)
            if expert >= layer.n_experts:
                total[token] += part * row
            elif layer.layout.family == "llama4":
                total[token] += part / weight * one_expert(layer, config, expert, weight * row)
            else:
                total[token] += part * one_expert(layer, config, expert, row[None])[0]
    return total, lost


def check_first_layer(model, applied, factors, renormalise=False):
    """The first MoE layer has the same input with and without, so it can be worked out by hand."""
    layers, inputs = find_moe_layers(model), zoo.batch()
    heard, full = listened(layers, model, inputs)
    before = dict(model.state_dict(keep_vars=True))
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with applied() as on:
        spies, output = spied(layers, model, inputs)
        lost = on.lost[layers[0].layer]
        assert torch.equal(listened(layers, model, inputs)[1], output)
    with torch.inference_mode():
        expected, n_lost = by_hand(
            layers[0], text_config(model), spies[0].hidden, heard[0], factors, renormalise
        )
    torch.testing.assert_close(spies[0].output, expected, rtol=1e-5, atol=1e-5)
    assert lost == n_lost
    assert not torch.equal(output, full)
    assert torch.equal(zoo.output_of(model, inputs), full)
    assert all(before[k] is v for k, v in model.state_dict(keep_vars=True).items())
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return n_lost


@pytest.mark.parametrize("mode", ["zero", "renormalise"])
def test_blocked_experts_add_nothing(model, name, mode):
    keep = keeping(find_moe_layers(model))
    factors = [float(expert in KEPT) for expert in range(8)]
    check_first_layer(model, lambda: mask(model, keep, mode=mode), factors, mode == "renormalise")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gains_multiply_outputs(model, name, implementation):
    try:
        model.set_experts_implementation(implementation)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    factors = [random.Random(expert).choice([0.0, 0.5, 1.0, 2.0, -1.0]) for expert in range(8)]
    table = np.tile(factors, (len(find_moe_layers(model)), 1))
    check_first_layer(model, lambda: amplify(model, table), factors)


def test_tokens_that_lose_all_experts_are_counted(token_ids, logits):
    model = models.build("mixtral")
    layers = find_moe_layers(model)
    with Blocked(model, keeping(layers, ()), "renormalise") as none:
        assert none.lost == dict.fromkeys(range(3), 0)
        assert logits(model, token_ids).isfinite().all()
        assert none.lost == dict.fromkeys(range(3), 24)
    check_lost = keeping(layers, (3,))
    with Blocked(model, check_lost, "zero") as one:
        logits(model, token_ids)
        assert all(0 < count < 24 for count in one.lost.values())


@pytest.mark.parametrize("family_name", ["mixtral", "llama4_text/top-2", "jetmoe"])
def test_gains_and_a_mask_nest_in_either_order(family_name):
    model = zoo.build(family_name)
    layers, inputs = find_moe_layers(model), zoo.batch()
    gain = {(layer.layer, expert): 1.5 + expert for layer in layers for expert in (0, 3, 6)}
    outputs = []
    with Mask(model, keeping(layers, (0, 3, 5, 6))), Gains(model, gain):
        outputs.append(zoo.output_of(model, inputs))
    with Gains(model, gain), Mask(model, keeping(layers, (0, 3, 5, 6))):
        outputs.append(zoo.output_of(model, inputs))
    assert torch.equal(*outputs)
    with Mask(model, keeping(layers, (0, 3, 5, 6))):
        assert not torch.equal(outputs[0], zoo.output_of(model, inputs))


def test_gains_of_gains_multiply_and_come_off_in_any_order(token_ids, logits):
    model = models.build("olmoe")
    full = logits(model, token_ids)
    six = {(0, expert): 6.0 for expert in range(8)}
    with Gains(model, six):
        expected = logits(model, token_ids)
    first = Gains(model, dict.fromkeys(six, 2.0))
    second = Gains(model, dict.fromkeys(six, 3.0))
    torch.testing.assert_close(logits(model, token_ids), expected)
    first.remove()
    second.remove()
    assert torch.equal(logits(model, token_ids), full)
    assert "8 of 24 experts, removed from Olmoe" in repr(second)


def test_removed_experts_equal_experts_without_weights(token_ids, logits):
    model = models.build("deepseek_v3", n_group=2, topk_group=1)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in find_moe_layers(twin):
            layer.experts.down_proj[[1, 3, 4, 6]] = 0
    with mask(model, keeping(find_moe_layers(model)), mode="zero"):
        found = logits(model, token_ids)
    torch.testing.assert_close(found, logits(twin, token_ids), rtol=0, atol=1e-6)


@pytest.fixture(params=["sorted", "looped"])
def remote(request, tmp_path):
    """A model of remote code, whose experts are modules."""
    getattr(registers, f"register_{request.param}")()
    yield load(save(tmp_path / "model", request.param)), request.param
    unregister_layout("small_moe")


def test_experts_that_are_modules(remote):
    model, dispatch = remote
    layers, inputs = find_moe_layers(model), zoo.batch()
    twin, gain = copy.deepcopy(model), {(1, 2): 0.0, (1, 5): 0.0, (2, 0): 3.0}
    with torch.no_grad():
        for (number, expert), factor in gain.items():
            layer = next(one for one in find_moe_layers(twin) if one.layer == number)
            layer.experts[expert].down_proj.weight *= factor
    with Gains(model, gain):
        found = zoo.output_of(model, inputs)
        assert torch.equal(listened(layers, model, inputs)[1], found)
    torch.testing.assert_close(found, zoo.output_of(twin, inputs), rtol=0, atol=1e-6)
    if dispatch == "looped":
        with pytest.raises(UnsupportedModelError, match="make weights of logits themselves"):
            mask(model, keeping(layers), mode="renormalise")
        return
    heard, _ = listened(layers, model, inputs)
    with mask(model, keeping(layers), mode="renormalise"):
        scaled, _ = listened(layers, model, inputs)
    old, new = heard[0].weights.sum(dim=1), scaled[0].weights.sum(dim=1)
    left = torch.isin(heard[0].ids, torch.tensor(KEPT)).any(dim=1)
    torch.testing.assert_close(new, torch.where(left, old, 0.0))


def test_evaluation_of_a_blocked_model_is_not_that_of_the_model(texts, tokenizer):
    model = models.build("qwen2_moe")
    full = evaluate(model, corpus=texts, tokenizer=tokenizer)
    with mask(model, keeping(find_moe_layers(model)), mode="zero") as blocked:
        found = evaluate(blocked, corpus=texts, tokenizer=tokenizer)
    assert found.loss != full.loss
    assert found.as_json()["inputs"] != full.as_json()["inputs"]
    again = evaluate(model, corpus=texts, tokenizer=tokenizer)
    assert (again.loss, again.as_json()["inputs"]) == (full.loss, full.as_json()["inputs"])


def test_all_that_is_on_a_model_is_in_its_digest(tokenizer):
    """However it is handed over, and gone from it with what was on."""

    def digest(given):
        return open_subject(given, tokenizer).digest

    model = models.build("qwen2_moe")
    keep, before = keeping(find_moe_layers(model)), set(vars(model))
    bare = digest(model)
    with amplify(model, {(0, 0): 5.0}) as outer:
        assert digest(model) == digest(outer) == digest(copy.deepcopy(model)) != bare
        more = amplify(model, {(0, 1): 5.0})
        both = digest(model)
        more.remove()
        more.remove()
        assert both != digest(model) == digest(outer)
    with mask(model, keep) as held:
        masked = digest(held)
        with amplify(model, {(0, 0): 5.0}):
            nested = digest(held)
    blocked = []
    for mode in ("zero", "renormalise"):
        with mask(model, keep, mode=mode):
            blocked.append(digest(model))
    assert len({bare, both, masked, nested, *blocked}) == 6
    assert digest(model) == bare
    with pytest.raises(PlanError):
        amplify(model, {(9, 0): 5.0})
    assert digest(model) == bare
    assert set(vars(model)) == before


@pytest.mark.parametrize(
    ("gain", "error", "message"),
    [
        ({(9, 0): 1.0}, PlanError, "no expert 0 in an MoE layer 9"),
        ({(0, 8): 1.0}, PlanError, r"layers \[0, 1, 2\] of 8 experts"),
        (np.ones((2, 8)), ShapeError, r"have shape \(2, 8\), expected \(3, 8\)"),
        ({(0, 0): float("nan")}, SettingsError, "gain is nan"),
    ],
)
def test_gains_that_cannot_be(gain, error, message):
    with pytest.raises(error, match=message):
        amplify(models.build("mixtral"), gain)


def test_modes_that_cannot_be(tmp_path):
    model = models.build("mixtral")
    keep = keeping(find_moe_layers(model))
    with pytest.raises(SettingsError, match="mode is 'soft'"):
        mask(model, keep, mode="soft")
    with pytest.raises(SettingsError, match="where a folder is written"):
        mask(model, keep, mode="zero", out=tmp_path / "masked")
    with pytest.raises(PlanError, match=r"MoE layers \[1\] but the model has \[0, 1, 2\]"):
        mask(model, Keep({1: (0, 1)}, 8, 2), mode="zero")


def test_gains_of_native_layers_know_how_many_experts_each_has():
    keep = Keep({0: (0, 1, 2, 3), 1: (0, 1, 2), 2: (0, 1)}, 8, 2)
    model = prune(models.build("mixtral"), keep, uneven="native")
    amplify(model, {(1, 2): 2.0}).remove()
    with pytest.raises(PlanError, match=r"no expert 3 in an MoE layer 1; .* of 3 experts"):
        amplify(model, {(1, 3): 2.0})
