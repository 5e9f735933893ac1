"""Criteria that hide experts, beside twins that mask the whole model or write routing out."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from probed import HIDING, SUBJECTS, WINDOWS, block_outputs, by_hand, hiding, losses

import models
import moecollab as mc
import zoo
from moecollab.criteria.probing import ablation, block, calls, reading, reconstruction
from moecollab.criteria.scoring import score
from moecollab.errors import DataError, SettingsError, UnsupportedModelError
from moecollab.models.masked import layer_barred, layer_masked
from moecollab.models.routing import find_moe_layers


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
        seen[name] = next(reading.blocks_of(model, layers, WINDOWS))
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
    model = SUBJECTS["sigmoid"]()
    find_moe_layers(model)[1].router.e_score_correction_bias[3] = -100
    for name in ("leave_one_out", "naee", "delta_nll", "fisher", "ego", "egn"):
        assert score(name, model=model, corpus=WINDOWS).values[1, 3] == 0, name


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
        with torch.inference_mode(), hide(layer, kept), calls.listening(layer) as ids:
            outputs.append(model(input_ids=torch.from_numpy(WINDOWS[0])[None]).logits)
        assert set(torch.cat(ids).reshape(-1).tolist()) <= set(kept)
    torch.testing.assert_close(*outputs)
