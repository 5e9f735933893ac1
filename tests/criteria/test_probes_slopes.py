"""Criteria that differentiate, or run every expert, beside twins from plain autograd and numpy."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from probed import SUBJECTS, WINDOWS, Heard, by_hand

import zoo
from moecollab.criteria.probing import everywhere, gains, gradients
from moecollab.criteria.scoring import score
from moecollab.errors import UnsupportedModelError
from moecollab.models.capture import capture
from moecollab.models.routing import find_moe_layers


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


@pytest.mark.parametrize("name", ["sigmoid", "groups", "modules", "dbrx", "longcat_flash"])
def test_every_expert_gives_what_it_gives_to_tokens_that_choose_it(name, small_moe):
    if name not in SUBJECTS and zoo.missing(name):
        pytest.skip(zoo.missing(name))
    model = SUBJECTS[name]() if name in SUBJECTS else zoo.build(name)
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
            if expert < layer.n_experts:
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


def test_experts_that_run_only_where_they_are_sent():
    with pytest.raises(UnsupportedModelError, match="run only where their router sends tokens"):
        score("eas", model=SUBJECTS["sorted"](), corpus=WINDOWS)
