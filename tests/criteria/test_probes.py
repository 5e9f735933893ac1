"""Criteria that run the model, beside twins that do the same the slow and plain way."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import models
import moecollab as mc
import zoo
from moecollab import criteria
from moecollab.criteria.base import Needs
from moecollab.criteria.probing import (
    ablation,
    block,
    everywhere,
    gains,
    gradients,
    reconstruction,
)
from moecollab.criteria.scoring import score
from moecollab.errors import DataError, MissingInputError, SettingsError, UnsupportedModelError
from moecollab.models.capture import capture
from moecollab.models.keep import Keep
from moecollab.models.layout import Layout
from moecollab.models.masked import Mask, layer_barred, layer_masked
from moecollab.models.registry import register_layout, unregister_layout
from moecollab.models.routing import find_moe_layers

NAMES = tuple(name for name in criteria.names() if Needs.MODEL in criteria.get(name).needs)
HIDING = ("leave_one_out", "leave_one_out_cos", "naee", "delta_nll")
WINDOWS = [np.random.default_rng(n).integers(3, 128, n) for n in (9, 16, 12)]


def plain(name, **changes):
    return lambda: models.build(name, **changes)


def of_modules():
    from test_remote import ours

    return models.randomised(ours.SmallMoeForCausalLM(ours.SmallMoeConfig()), 0)


SUBJECTS = {
    "mixtral": plain("mixtral", num_local_experts=6),  # weights add up to 1
    "shared": plain("qwen2_moe", num_experts=6),  # weights are shares of all experts
    "sigmoid": plain("deepseek_v3", n_routed_experts=6),  # and a bias to choose by
    "groups": plain("deepseek_v3", n_routed_experts=8, n_group=2, topk_group=1),
    "parallel": lambda: zoo.build("gemma4_text"),  # the block is the whole decoder layer
    "scaled_input": lambda: zoo.build("llama4_text/top-2"),
    "sorted": lambda: zoo.build("jetmoe"),
    "modules": of_modules,
}


@pytest.fixture(autouse=True)
def _small_moe():
    """A family of remote code, whose experts are a list of modules."""
    register_layout(Layout(family="small_moe", count="n_routed_experts", capture="modules"))
    yield
    unregister_layout("small_moe")


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return SUBJECTS[request.param]()


@contextmanager
def hiding(model, layer, dropped):
    """Hides experts by a mask, or where the router has groups by a bias of -∞."""
    kept = tuple(e for e in range(layer.n_experts) if e not in dropped)
    if getattr(layer.router, "num_group", None) in (None, 1):
        every = {one.layer: tuple(range(one.n_experts)) for one in find_moe_layers(model)}
        with Mask(model, Keep(every | {layer.layer: kept}, layer.n_experts, layer.top_k)):
            yield
        return
    bias = layer.router.e_score_correction_bias
    before = bias.clone()
    bias[list(dropped)] = -torch.inf
    yield
    bias.copy_(before)


def block_outputs(model, layer):
    """What a block returns for every window, its arguments being those of the plain model."""
    calls, found = [], []

    def keep(_module, args, kwargs):
        calls.append(copy.deepcopy((args, kwargs)))

    handle = layer.block.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.inference_mode():
        for window in WINDOWS:
            model(input_ids=torch.from_numpy(window)[None], use_cache=False)
    handle.remove()

    def run(dropped):
        found = []
        with torch.inference_mode(), hiding(model, layer, dropped):
            for args, kwargs in copy.deepcopy(calls):
                output = layer.block(*args, **kwargs)
                output = output if isinstance(output, torch.Tensor) else output[0]
                found.append(output.reshape(-1, output.shape[-1]).double().numpy())
        return found

    assert not found
    return run


def losses(model):
    """Next-token loss of all windows, in nats."""
    total = 0.0
    with torch.inference_mode():
        for window in WINDOWS:
            ids = torch.from_numpy(window)
            logits = model(input_ids=ids[None]).logits[0]
            total += float(F.cross_entropy(logits[:-1].double(), ids[1:], reduction="sum"))
    return total


def test_leave_one_out_is_what_a_mask_does_to_the_block(subject):
    squares = score("leave_one_out", model=subject, corpus=WINDOWS)
    cosines = score("leave_one_out_cos", model=subject, corpus=WINDOWS)
    n_tokens = sum(map(len, WINDOWS))
    for row, layer in enumerate(find_moe_layers(subject)):
        run = block_outputs(subject, layer)
        whole = np.concatenate(run(()))
        for expert in range(layer.n_experts):
            found = np.concatenate(run((expert,)))
            off = ((found - whole) ** 2).sum() / (whole**2).sum()
            sizes = np.linalg.norm(found, axis=1) * np.linalg.norm(whole, axis=1)
            turned = (1 - (found * whole).sum(axis=1) / sizes).sum() / n_tokens
            assert squares.values[row, expert] == pytest.approx(off, rel=1e-4, abs=1e-9)
            assert cosines.values[row, expert] == pytest.approx(turned, rel=1e-4, abs=1e-8)


def test_leave_one_out_by_hand():
    """Mixtral's routing written out: the two best of those that are left, their shares."""
    model = SUBJECTS["mixtral"]()
    layer = find_moe_layers(model)[0]
    given = []
    handle = layer.block.register_forward_pre_hook(lambda _m, args: given.append(args[0][0]))
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(WINDOWS[1])[None])
    handle.remove()
    rows = given[0].detach()
    logits = (rows @ layer.router.weight.detach().T).double()
    outputs = torch.stack([by_hand(layer, e, rows) for e in range(6)], dim=1).double()

    def mixed(left):
        best = logits[:, left].topk(2, dim=1)
        weights = best.values.softmax(dim=1)
        picked = outputs[torch.arange(len(rows))[:, None], torch.tensor(left)[best.indices]]
        return (weights[..., None] * picked).sum(dim=1)

    whole = mixed(list(range(6)))
    found = score("leave_one_out", model=model, corpus=[WINDOWS[1]]).values[0]
    for expert in range(6):
        off = (mixed([e for e in range(6) if e != expert]) - whole).square().sum()
        assert found[expert] == pytest.approx(float(off / whole.square().sum()), rel=1e-4)


def by_hand(layer, expert, rows):
    """What an expert of Mixtral makes of rows."""
    gate, up = layer.experts.gate_up_proj[expert].detach().chunk(2)
    return (F.silu(rows @ gate.T) * (rows @ up.T)) @ layer.experts.down_proj[expert].detach().T


def distance(run, dropped):
    """Σ over windows of the Frobenius norm of what changes without some experts."""
    pairs = zip(run(dropped), run(()), strict=True)
    return sum(np.linalg.norm(found - whole) for found, whole in pairs)


@pytest.mark.parametrize("name", ["mixtral", "shared", "sigmoid"])
@pytest.mark.parametrize("drop", [1 / 3, 1 / 2])
def test_naee_finds_the_best_of_all_sets(name, drop):
    model = SUBJECTS[name]()
    found = score("naee", model=model, corpus=WINDOWS, drop=drop)
    assert found.settings["drop"] == drop
    n_drop = math.floor(6 * drop + 0.5)
    for row, layer in enumerate(find_moe_layers(model)):
        run = block_outputs(model, layer)
        best = min(combinations(range(6), n_drop), key=lambda gone: distance(run, gone))
        alone = [distance(run, (expert,)) for expert in range(6)]
        order = sorted(best, key=alone.__getitem__)
        order += sorted(set(range(6)) - set(best), key=alone.__getitem__)
        assert np.argsort(found.values[row]).tolist() == order
        assert sorted(found.values[row]) == list(range(6))


@pytest.mark.parametrize("name", ["mixtral", "shared", "groups"])
@pytest.mark.parametrize("n_drop", [0, 3])
def test_naee_one_by_one_where_there_are_too_many_sets(name, n_drop, monkeypatch):
    monkeypatch.setattr(reconstruction, "SUBSETS", 0)
    model = SUBJECTS[name]()
    n_experts = find_moe_layers(model)[0].n_experts
    found = score("naee", model=model, corpus=WINDOWS, drop=n_drop / n_experts)
    for row, layer in enumerate(find_moe_layers(model)):
        run = block_outputs(model, layer)
        gone, left = [], list(range(n_experts))
        for _ in range(max(n_drop, 1)):
            costs = {one: distance(run, (*gone, one)) for one in left}
            if len(gone) < n_drop:
                gone.append(min(left, key=costs.__getitem__))
                left.remove(gone[-1])
        order = [*gone, *sorted(left, key=costs.__getitem__)]
        assert np.argsort(found.values[row]).tolist() == order


def test_the_bound_between_all_sets_and_one_by_one(monkeypatch):
    """C(6, 3) = 20 sets, for which every set is tried; with a bound of 19, none are."""
    called = []
    for name in ("every_set", "greedy"):
        real = getattr(reconstruction, name)
        monkeypatch.setattr(
            reconstruction,
            name,
            lambda *args, real=real, name=name: called.append(name) or real(*args),
        )
    model = SUBJECTS["mixtral"]()
    for bound in (20, 19):
        monkeypatch.setattr(reconstruction, "SUBSETS", bound)
        score("naee", model=model, corpus=WINDOWS, drop=0.5)
    assert called == ["every_set"] * 3 + ["greedy"] * 3


def test_delta_nll_is_the_loss_of_the_model_without_the_expert(subject):
    found = score("delta_nll", model=subject, corpus=WINDOWS).values
    whole = losses(subject)
    n_predicted = sum(len(window) - 1 for window in WINDOWS)
    for row, layer in enumerate(find_moe_layers(subject)):
        for expert in range(layer.n_experts):
            with hiding(subject, layer, (expert,)):
                delta = (losses(subject) - whole) / n_predicted
            assert found[row, expert] == pytest.approx(delta, rel=1e-4, abs=1e-5)


def test_delta_nll_is_the_loss_of_a_pruned_checkpoint(tmp_path, texts):
    """The expert is cut out of the files, and the smaller model evaluated on the same text."""
    changes = {"num_hidden_layers": 2, "mlp_only_layers": [0]}
    folder = models.save("qwen2_moe", tmp_path / "model", **changes)
    short = [text for text in texts if len(text["text"]) < 64]  # one window each
    assert len(short) == 2
    found = score("delta_nll", model=folder, corpus=short).values[0]
    settings = {"corpus": short, "context": 64}
    whole = mc.evaluate(folder, **settings).loss
    for expert in (0, 5):
        kept = tuple(e for e in range(8) if e != expert)
        plan = mc.Plan(keep={1: kept}, n_experts=8, top_k=2, criterion="x", drop=1 / 8, per="layer")
        pruned = mc.prune(folder, plan, out=tmp_path / f"without-{expert}")
        assert mc.evaluate(pruned, **settings).loss - whole == pytest.approx(
            found[expert], abs=1e-5
        )


@pytest.mark.parametrize("name", ["mixtral", "shared"])
@pytest.mark.parametrize("broken", ["resume", "rowwise"])
def test_slow_ways_agree(name, broken, monkeypatch):
    """What is done where a model cannot go on from a layer, or runs tokens together only."""
    model = SUBJECTS[name]()
    expected = {one: score(one, model=model, corpus=WINDOWS).values for one in HIDING}
    if broken == "resume":
        monkeypatch.setattr(ablation, "_decoder", lambda _model: [])
    else:
        monkeypatch.setattr(block.Block, "_is_rowwise", lambda _self: False)
    for one in HIDING:
        found = score(one, model=model, corpus=WINDOWS).values
        np.testing.assert_allclose(found, expected[one], rtol=1e-4, atol=1e-5, err_msg=one)


def test_only_tokens_that_chose_the_expert_run_again():
    """Where weights add up to 1; not where they are shares of what all experts get."""
    seen = {}
    for name in ("mixtral", "shared", "sigmoid", "groups", "parallel"):
        model = SUBJECTS[name]()
        layers = find_moe_layers(model)[:1]
        seen[name] = next(block.blocks_of(model, layers, WINDOWS))
    assert {name: one.rowwise for name, one in seen.items()} == {
        "mixtral": True, "shared": True, "sigmoid": True, "groups": True, "parallel": False
    }  # fmt: skip
    assert {name for name, one in seen.items() if one.local} == {"mixtral", "sigmoid"}
    found = seen["mixtral"]
    tokens = found.concerned((2, 4)).tolist()
    chosen = [{2, 4} & set(row) for row in found.ids.tolist()]
    assert tokens == [token for token, own in enumerate(chosen) if own]
    assert 0 < len(tokens) < sum(map(len, WINDOWS))


def test_an_expert_that_no_token_chooses_costs_nothing():
    model = SUBJECTS["mixtral"]()
    layer = find_moe_layers(model)[1]
    ids = block.record(model, [layer], WINDOWS[:1], whole=False)[0][0].chosen[0]
    unused = sorted(set(range(6)) - set(ids.reshape(-1).tolist()))
    if not unused:
        with torch.no_grad():
            layer.router.weight[3] = -100 * layer.router.weight[0]
    for name in ("leave_one_out", "delta_nll", "fisher", "ego", "egn"):
        model = SUBJECTS["sigmoid"]()
        layer = find_moe_layers(model)[1]
        layer.router.e_score_correction_bias[3] = -100
        assert score(name, model=model, corpus=WINDOWS).values[1, 3] == 0, name
    assert score("naee", model=model, corpus=WINDOWS).values[1, 3] == 0


class Heard:
    """Ids, weights and outputs of one call of a layer's experts."""

    def routing(self, ids, weights):
        self.ids, self.weights = ids, weights
        self.rows = None

    def outputs(self, rows, places):
        if self.rows is None:
            self.rows = torch.zeros(self.ids.numel(), rows.shape[1])
        self.rows[places] = rows

    def total(self, routed):
        pass


def keep_slope(sums, _module, _args, output):
    output.retain_grad()
    sums.append(output)


@pytest.mark.parametrize("name", ["mixtral", "shared", "sigmoid", "groups"])
def test_fisher_is_the_gradient_by_the_sum_times_what_an_expert_adds(name):
    model = SUBJECTS[name]()
    layers = find_moe_layers(model)
    found = score("fisher", model=model, corpus=WINDOWS, seed=5).values
    expected = np.zeros(found.shape)
    for number, window in enumerate(WINDOWS):
        heard, sums, handles = [Heard() for _ in layers], [], []
        for layer, one in zip(layers, heard, strict=True):
            handles += capture(layer, one, outputs=True).attach()
            handles.append(layer.experts.register_forward_hook(partial(keep_slope, sums)))
        logits = model(input_ids=torch.from_numpy(window)[None]).logits[0]
        for handle in handles:
            handle.remove()
        draw = torch.Generator().manual_seed(5 + (number << 32))
        words = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=draw)
        logits.log_softmax(dim=-1).gather(1, words).sum().backward()
        for row, (one, total) in enumerate(zip(heard, sums, strict=True)):
            slope = total.grad.reshape(-1, total.shape[-1]).numpy()
            added = one.weights.reshape(-1, 1).numpy() * one.rows.numpy()
            for place, expert in enumerate(one.ids.reshape(-1).tolist()):
                token = place // one.ids.shape[1]
                expected[row, expert] += float(slope[token] @ added[place]) ** 2
    n_tokens = sum(map(len, WINDOWS))
    np.testing.assert_allclose(found, expected / n_tokens, rtol=1e-4, atol=1e-9)


def test_fisher_predicts_what_a_smaller_gain_does(subject):
    """½ ε² Σ_t F_t is the divergence when each token's output shrinks by ε, by itself."""
    layer = find_moe_layers(subject)[0]
    window = WINDOWS[0]
    draws = [score("fisher", model=subject, corpus=[window], seed=s).values[0] for s in range(60)]
    expected = 0.5 * np.mean(draws) * layer.n_experts * len(window)
    assert divergence(subject, layer, window) == pytest.approx(expected, rel=0.35)


def divergence(model, layer, window, step=0.01):
    """Σ over slots of KL(p ‖ p') / ε², p' with one slot's gain at 1 - ε."""
    ids = torch.from_numpy(window)[None]
    real = gains._ones

    def run(changed):
        n_slots = 0

        def other(slots, experts, shape):
            nonlocal n_slots
            gain = real(slots, experts, shape).detach()
            if 0 <= changed - n_slots < gain.numel():
                gain.reshape(-1)[changed - n_slots] -= step
            n_slots += gain.numel()
            return gain

        with pytest.MonkeyPatch.context() as patch, torch.no_grad(), gains.gains(layer):
            patch.setattr(gains, "_ones", other)
            logits = model(input_ids=ids).logits[0]
        return logits.double().log_softmax(dim=-1), n_slots

    whole, n_slots = run(-1)
    others = (run(slot)[0] for slot in range(n_slots))
    return sum(float((whole.exp() * (whole - other)).sum()) for other in others) / step**2


def test_fisher_draws_by_seed():
    model = SUBJECTS["mixtral"]()
    runs = [score("fisher", model=model, corpus=WINDOWS, seed=seed).values for seed in (0, 0, 1)]
    assert runs[0].tobytes() == runs[1].tobytes()
    assert not np.allclose(runs[0], runs[2])


@pytest.mark.parametrize("name", ["mixtral", "sigmoid", "shared"])
def test_gradient_group(name):
    model = SUBJECTS[name]()
    other = copy.deepcopy(model)
    for window in WINDOWS:
        ids = torch.from_numpy(window)
        logits = other(input_ids=ids[None]).logits[0]
        F.cross_entropy(logits[:-1], ids[1:], reduction="sum").backward()
    found = {one: score(one, model=model, corpus=WINDOWS).values for one in
             ("egs", "ege", "ego", "egn")}  # fmt: skip
    for row, layer in enumerate(find_moe_layers(other)):
        stacks = [layer.experts.gate_up_proj.grad, layer.experts.down_proj.grad]
        flat = [
            np.concatenate([stack[e].double().numpy().ravel() for stack in stacks])
            for e in range(layer.n_experts)
        ]
        for e in range(layer.n_experts):
            cosines = [
                flat[e] @ flat[o] / np.linalg.norm(flat[e]) / np.linalg.norm(flat[o])
                for o in range(layer.n_experts)
                if o != e
            ]
            columns = [column for stack in stacks for column in stack[e].double().numpy().T]
            expected = {
                "egs": -sum(cosines),
                "ege": sum(np.log(max(column.std(), 1e-12)) for column in columns),
                "egn": sum(np.linalg.norm(column) for column in columns),
                "ego": sum(
                    (abs(column - column.mean()) > 3 * column.std()).sum() for column in columns
                ),
            }
            for one, value in expected.items():
                assert found[one][row, e] == pytest.approx(value, rel=1e-3, abs=1e-3), one


def test_gradients_a_layer_at_a_time(monkeypatch):
    model = SUBJECTS["mixtral"]()
    expected = score("egn", model=model, corpus=WINDOWS).values
    monkeypatch.setattr(gradients, "HELD", 1)
    np.testing.assert_allclose(score("egn", model=model, corpus=WINDOWS).values, expected)


def test_activation_group_by_hand(monkeypatch):
    model = SUBJECTS["mixtral"]()
    found = {one: score(one, model=model, corpus=WINDOWS).values for one in ("eas", "eao")}
    rows = [[] for _ in find_moe_layers(model)]
    handles = [
        layer.block.register_forward_pre_hook(lambda _m, args, own=own: own.append(args[0][0]))
        for layer, own in zip(find_moe_layers(model), rows, strict=True)
    ]
    with torch.inference_mode():
        for window in WINDOWS:
            model(input_ids=torch.from_numpy(window)[None])
    for handle in handles:
        handle.remove()
    for row, layer in enumerate(find_moe_layers(model)):
        given = torch.cat(rows[row])
        outputs = [by_hand(layer, e, given).double().numpy() for e in range(6)]
        for e, own in enumerate(outputs):
            cosines = [
                a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                for o, other in enumerate(outputs)
                if o != e
                for a, b in zip(own, other, strict=True)
            ]
            far = abs(own - own.mean(axis=0)) > 3 * own.std(axis=0)
            assert found["eas"][row, e] == pytest.approx(-sum(cosines) / len(given), abs=1e-5)
            assert found["eao"][row, e] == far.sum()
    monkeypatch.setattr(everywhere, "HELD", 1)  # a token at a time
    again = score("eas", model=model, corpus=WINDOWS).values
    np.testing.assert_allclose(again, found["eas"], atol=1e-5)


@pytest.mark.parametrize("name", ["sigmoid", "groups", "modules"])
def test_every_expert_gives_what_it_gives_to_tokens_that_choose_it(name):
    model = SUBJECTS[name]()
    layer = find_moe_layers(model)[0]
    with torch.inference_mode():
        outputs = next(next(everywhere.everyone(model, [layer], WINDOWS[:1])).outputs())
    heard = Heard()
    handles = capture(layer, heard, outputs=True).attach()
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(WINDOWS[0])[None])
    for handle in handles:
        handle.remove()
    told = heard.rows.reshape(*heard.ids.shape, -1)
    for token, own in enumerate(heard.ids.tolist()):
        for slot, expert in enumerate(own):
            np.testing.assert_allclose(outputs[expert, token], told[token, slot], atol=1e-5)


def test_every_expert_of_llama_4_at_a_gate_of_1():
    model = SUBJECTS["scaled_input"]()
    layer = find_moe_layers(model)[0]
    with torch.inference_mode():
        one = next(everywhere.everyone(model, [layer], WINDOWS[:1]))
        outputs = next(one.outputs())
        for expert in range(layer.n_experts):
            gate, up = (one.rows[0] @ layer.experts.gate_up_proj[expert]).chunk(2, dim=-1)
            expected = (up * F.silu(gate)) @ layer.experts.down_proj[expert]
            np.testing.assert_allclose(outputs[expert], expected, atol=1e-5)


def state(model):
    """All that running a model could change."""
    modules = list(model.modules())
    hooks = [
        len(vars(module)[kind])
        for module in modules
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    ]
    return {
        "values": {key: value.clone() for key, value in model.state_dict().items()},
        "objects": [id(value) for value in model.state_dict(keep_vars=True).values()],
        "flags": [one.requires_grad for one in model.parameters()],
        "grads": [None if one.grad is None else one.grad.clone() for one in model.parameters()],
        "modes": [module.training for module in modules],
        "own": [sorted(vars(module)) for module in modules],
        "hooks": hooks,
    }


def assert_same(model, before):
    after = state(model)
    for key, value in before.pop("values").items():
        assert torch.equal(after["values"][key], value), key
    after.pop("values")
    for one, other in zip(before.pop("grads"), after.pop("grads"), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert after == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["shared", "groups"])
def test_the_model_is_left_as_it_was(name, kind):
    model = SUBJECTS[kind]().train()
    first, second, *_ = model.parameters()
    first.requires_grad_(False)
    second.grad = torch.ones_like(second)
    model.model.layers[1].eval()
    before = state(model)
    with torch.no_grad():
        score(name, model=model, corpus=WINDOWS)
    assert torch.is_grad_enabled()
    assert_same(model, before)


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_one_clear_error_and_leaves_the_model_as_it_was(name):
    model = SUBJECTS["shared"]()
    with torch.no_grad():
        find_moe_layers(model)[1].experts.down_proj[:, 0, 0] = 3e38
    before = state(model)
    message = r"(the loss on window 0 of the text|what model.layers.1.mlp returns|what the experts "
    message += r"of model.layers.1.mlp return) is not finite; look for NaN"
    with pytest.raises(DataError, match=message):
        score(name, model=model, corpus=WINDOWS)
    assert_same(model, before)


@pytest.mark.parametrize("name", NAMES)
def test_text_is_needed(name):
    with pytest.raises(MissingInputError, match="pass model= and corpus="):
        score(name, model=SUBJECTS["mixtral"](), corpus=[np.array([], np.int64)])


def test_what_cannot_be_hidden():
    model = models.build("mixtral", num_local_experts=2)
    for name in HIDING:
        with pytest.raises(SettingsError, match=r"'1 of 2 experts'; it must be such that no fewer"):
            score(name, model=model, corpus=WINDOWS)
    with pytest.raises(SettingsError, match=r"'5 of 6 experts'.* the 2 that a token chooses"):
        score("naee", model=SUBJECTS["mixtral"](), corpus=WINDOWS, drop=0.8)
    grouped = zoo.build("deepseek_v2/groups")
    with pytest.raises(UnsupportedModelError, match="chooses by groups of experts and has no e_sc"):
        score("delta_nll", model=grouped, corpus=WINDOWS)
    few = SUBJECTS["groups"]()
    with pytest.raises(UnsupportedModelError, match=r"hold too few experts when 6 are hidden"):
        score("naee", model=few, corpus=WINDOWS, drop=0.75)
    with pytest.raises(UnsupportedModelError, match="run only where their router sends tokens"):
        score("eas", model=SUBJECTS["sorted"](), corpus=WINDOWS)


def test_nothing_is_predicted_in_windows_of_one_token():
    model = SUBJECTS["mixtral"]()
    with pytest.raises(DataError, match="no window of the text has two tokens"):
        score("delta_nll", model=model, corpus=[np.array([5])])
    short = [*WINDOWS, np.array([5])]
    for name in ("delta_nll", "egn"):
        first, second = (score(name, model=model, corpus=c).values for c in (WINDOWS, short))
        np.testing.assert_allclose(first, second, rtol=1e-6)


def test_a_barred_expert_is_chosen_by_no_token():
    model = SUBJECTS["sigmoid"]()
    layer = find_moe_layers(model)[0]
    kept = (0, 2, 3, 5)
    outputs = []
    for hide in (layer_barred, layer_masked):
        with torch.inference_mode(), hide(layer, kept), block.listening(layer) as ids:
            outputs.append(model(input_ids=torch.from_numpy(WINDOWS[0])[None]).logits)
        assert set(torch.cat(ids).reshape(-1).tolist()) <= set(kept)
    torch.testing.assert_close(*outputs)
