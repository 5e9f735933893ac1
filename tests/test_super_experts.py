"""Super experts are found where they were planted, and nowhere else."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from typer.testing import CliRunner

import models
import moecollab as mc
from expert_twin import one_expert
from moecollab.analysis.ablation import without
from moecollab.analysis.profiling import SHARED, Profile, profile, shared_experts
from moecollab.analysis.sinks import decay, sink_mass
from moecollab.analysis.super_experts import (
    Rules,
    load_super_experts,
    select,
    super_experts,
    thresholds,
)
from moecollab.cli.main import app
from moecollab.errors import DataError, MoeCollabError, SettingsError, UnsupportedModelError
from moecollab.models.routing import find_moe_layers
from moecollab.record.corpus import Document
from moecollab.record.windows import Sample
from scored import make_scores

CONTEXT = 12


@pytest.fixture
def model():
    return models.build("qwen2_moe", num_hidden_layers=4)


@pytest.fixture
def samples():
    rng = np.random.default_rng(0)
    return [
        Sample(Document(str(i), "d", "x"), rng.integers(3, 250, n).astype(np.uint32))
        for i, n in enumerate((12, 30, 7))
    ]


def seen(model, samples, **rules):
    made = profile(model, samples, context=CONTEXT, batch_size=2)
    return select(made, Rules(**rules))


def plant(model, layer, expert, by=1_000.0, channel=5):
    """Makes one output channel of an expert large."""
    with torch.no_grad():
        find_moe_layers(model)[layer].experts.down_proj[expert, channel] *= by


def windows_of(samples):
    return [one.ids[at : at + CONTEXT] for one in samples for at in range(0, len(one.ids), CONTEXT)]


def twin(model, samples):
    """Largest magnitudes by brute force: every routed token through its experts, one by one."""
    layers = find_moe_layers(model)
    every, first = (np.zeros((len(layers), models.N_EXPERTS)) for _ in range(2))
    for window in windows_of(samples):
        calls = []
        hooks = [
            one.experts.register_forward_pre_hook(lambda _m, args, to=calls: to.append(args))
            for one in layers
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor(window.astype(np.int64))[None])
        for hook in hooks:
            hook.remove()
        for row, (layer, (hidden, ids, _weights)) in enumerate(zip(layers, calls, strict=True)):
            seen_before = set()
            for slot in range(ids.shape[1]):
                for token in range(len(ids)):
                    expert = int(ids[token, slot])
                    with torch.no_grad():
                        out = one_expert(layer, model.config, expert, hidden[token : token + 1])
                    size = float(out.abs().max())
                    every[row, expert] = max(every[row, expert], size)
                    if expert not in seen_before:
                        first[row, expert] = max(first[row, expert], size)
                    seen_before.add(expert)
    return every, first


def by_site(found, column):
    routed = found.experts.filter(pl.col("expert") != SHARED).sort("layer", "expert")
    return routed[column].to_numpy().reshape(-1, models.N_EXPERTS)


def test_largest_outputs_equal_brute_force(model, samples):
    found = seen(model, samples)
    every, first = twin(model, samples)
    np.testing.assert_allclose(by_site(found, "max_abs"), every, rtol=1e-5)
    np.testing.assert_allclose(by_site(found, "first_row"), first, rtol=1e-5)
    assert (first < every * 0.999).any()  # so the two are told apart


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_fused_and_looped_experts_give_the_same(model, samples, implementation):
    model.set_experts_implementation("eager")
    eager = seen(model, samples).experts
    model.set_experts_implementation(implementation)
    other = seen(model, samples).experts
    assert eager.drop("value", "max_abs", "first_row", "first_weight", "other_weight").equals(
        other.drop("value", "max_abs", "first_row", "first_weight", "other_weight")
    )
    np.testing.assert_allclose(eager["max_abs"], other["max_abs"], rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_batches_change_nothing(model, samples, size):
    one = profile(model, samples, context=CONTEXT, batch_size=3)
    other = profile(model, samples, context=CONTEXT, batch_size=size)
    assert one.n_windows == other.n_windows == 5
    np.testing.assert_allclose(one.experts["max_abs"], other.experts["max_abs"], rtol=1e-5)
    np.testing.assert_allclose(one.experts["at_first"], other.experts["at_first"])
    np.testing.assert_allclose(one.hidden["max_abs"], other.hidden["max_abs"], rtol=1e-5)


def test_planted_experts_are_found_and_no_others(model, samples):
    everyone = by_site(seen(model, samples), "tokens")
    planted = [(0, int(everyone[0].argmax())), (2, int(everyone[2].argmax()))]
    for layer, expert in planted:
        plant(model, layer, expert)
    found = seen(model, samples, layers="depth")
    assert sorted(found.found) == planted
    rows = found.experts.filter(pl.col("kind") == "super")
    assert set(rows["channel"]) == {5}
    assert found.keep == {layer: [expert] for layer, expert in planted}


def test_a_negative_channel_is_found(model, samples):
    layer = find_moe_layers(model)[0]
    expert = int(by_site(seen(model, samples), "tokens")[0].argmax())
    with torch.no_grad():  # what is large is below 0 for every token
        layer.experts.down_proj[expert, 5] = 0
        layer.experts.gate_up_proj[expert, 0] *= 0
        hidden = layer.experts.gate_up_proj.shape[1] // 2
        layer.experts.gate_up_proj[expert, hidden] *= 0
    calls = []
    hook = layer.experts.register_forward_pre_hook(lambda _m, args: calls.append(args))
    seen(model, samples)
    hook.remove()
    outs = []
    for hidden_states, ids, _ in calls:
        rows = hidden_states[(ids == expert).any(dim=1)]
        with torch.no_grad():
            outs.append(layer.experts.act_fn(rows @ layer.experts.gate_up_proj[expert, 1]))
    sign = -1.0 if torch.cat(outs).abs().max() == torch.cat(outs).max() else 1.0
    plant(model, 0, expert, by=1.0)
    with torch.no_grad():
        layer.experts.down_proj[expert] *= 1e-3
        layer.experts.down_proj[expert, 5, 1] = sign * 1e4
    found = seen(model, samples, layers="depth")
    assert (0, expert) in found.found


def test_late_experts_are_outliers(model, samples):
    expert = int(by_site(seen(model, samples), "tokens")[3].argmax())
    plant(model, 3, expert, by=1e5)
    early = int(by_site(seen(model, samples), "tokens")[0].argmax())
    plant(model, 0, early, by=1e5)
    found = seen(model, samples, layers="depth")
    assert (0, early) in found.found
    assert found.outliers == [(3, expert)]


def test_a_peak_after_the_first_row_is_missed_by_the_published_reduction(model, samples):
    every, first = twin(model, samples)
    layer, expert = np.unravel_index((every / np.maximum(first, 1e-9)).argmax(), every.shape)
    rows = seen(model, samples).experts.filter(
        (pl.col("layer") == layer) & (pl.col("expert") == expert)
    )
    assert rows["position"][0] > 0
    assert rows["max_abs"][0] > rows["first_row"][0]


def test_taking_a_planted_expert_away_takes_the_massive_activation(model, samples):
    expert = int(by_site(seen(model, samples), "tokens")[1].argmax())
    plant(model, 1, expert, by=1e6)
    before = profile(model, samples, context=CONTEXT, batch_size=2).hidden
    with without(model, [(1, expert)]):
        after = profile(model, samples, context=CONTEXT, batch_size=2).hidden
    assert select(profile(model, samples, context=CONTEXT, batch_size=2)).layers == (1,)
    assert before["max_abs"][2] > 1e3 * after["max_abs"][2]
    np.testing.assert_allclose(before["max_abs"][:2], after["max_abs"][:2], rtol=1e-6)


def test_shared_experts_are_seen_and_taken_away(model, samples):
    shared = shared_experts(model, find_moe_layers(model))
    assert sorted(shared) == [0, 1, 2, 3]
    with torch.no_grad():
        shared[1].down_proj.weight[7] *= 1e4
    found = seen(model, samples, layers="depth")
    assert found.found == [(1, SHARED)]
    assert found.keep == {}
    assert seen(model, samples, layers="depth", include_shared=False).experts["expert"].min() == 0
    ids = torch.tensor([[5, 6, 7]])
    outputs = []
    hook = find_moe_layers(model)[1].block.register_forward_hook(
        lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad(), without(model, [(1, SHARED)]):
        model(input_ids=ids)
        shared[1].down_proj.weight.zero_()
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    assert torch.equal(outputs[0], outputs[1])


def made(values, hidden=(1.0, 1.0, 1.0), tokens=None):
    """A profile of three layers with some largest outputs, (3, n)."""
    values = np.asarray(values, float)
    n = values.shape[1]
    counts = np.ones(values.size, int) if tokens is None else np.ravel(tokens)
    experts = pl.DataFrame(
        {
            "layer": np.repeat(np.arange(3), n),
            "expert": np.tile(np.arange(n), 3),
            "tokens": counts,
            "max_abs": values.ravel(),
            "first_row": values.ravel() / 2,
        }
    )
    rows = {"layer": range(-1, 3), "max_abs": [1.0, *hidden], "median_abs": [0.01] * 4}
    return Profile(experts, pl.DataFrame(rows | {"before": [1.0, 1.0, *hidden[:2]]}), 3, 9, 3)


def test_thresholds_are_numpys():
    values = np.random.default_rng(1).exponential(size=2_000)
    high, part = thresholds(values, None, 0.1)
    assert (high, part) == (np.percentile(values, 99.5), 0.1 * values.max())
    assert np.isnan(thresholds(values[:999], None, 0.1)[0])
    assert thresholds(values[:10], 50.0, 0.1)[0] == np.percentile(values[:10], 50)


def test_layers_by_depth_are_rounded():
    found = select(made(np.ones((3, 4))), Rules(layers="depth"))
    assert found.layers == (0, 1)  # round(2.25)


def test_layers_by_growth_and_by_massive_activations():
    grew = made(np.ones((3, 4)), hidden=(4.0, 21.0, 22.0))
    assert select(grew, Rules(layers="growth")).layers == (1,)
    massive = made(np.ones((3, 4)), hidden=(99.0, 101.0, 110.0))
    assert select(massive).layers == ()  # 101 was 99 before
    massive = made(np.ones((3, 4)), hidden=(50.0, 101.0, 110.0))
    assert select(massive).layers == (1,)


def test_thresholds_are_strict_and_of_the_chosen_layers():
    values = np.full((3, 4), 1.0)
    values[0, 0], values[0, 1], values[2, 3] = 10.0, 1.01, 100.0
    found = select(made(values), Rules(layers="depth"))
    assert found.thresholds[1] == 1.0
    assert found.found == [(0, 0), (0, 1)]  # 1.0 is not above 1.0
    assert found.outliers == [(2, 3)]
    assert select(made(values), Rules(layers="depth", among="model")).found == []


def test_an_expert_that_is_never_routed_is_not_flagged():
    tokens = np.ones((3, 4), int)
    tokens[0, 0] = 0
    values = np.zeros((3, 4))
    assert select(made(values, tokens=tokens), Rules(layers="depth", ratio=0.0)).found == []
    values[0, 0] = 5.0
    assert select(made(values, tokens=tokens), Rules(layers="depth")).found == []


def test_attention_on_the_first_token_is_the_models_own(model, samples):
    windows = [window.tolist() for window in windows_of(samples)]
    model.set_attn_implementation("sdpa")
    found = sink_mass(model, windows)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    want = np.zeros((4, 4))
    with torch.no_grad():
        for window in windows:
            attentions = model(input_ids=torch.tensor([window]), output_attentions=True).attentions
            want += [one[0, :, 1:, 0].mean(dim=1).numpy() for one in attentions]
    np.testing.assert_allclose([found[layer] for layer in range(4)], want / len(windows), rtol=1e-5)


def test_decay_is_0_for_nothing_and_1_for_all():
    before = {0: np.array([0.5, 0.9]), 1: np.array([0.01, 0.02])}
    same = decay(before, before)
    assert same["decay"].to_list() == [0.0, None]
    gone = decay(before, {0: np.zeros(2), 1: np.zeros(2)})
    assert gone["decay"].to_list() == gone["decay_of_means"].to_list() == [1.0, None]
    half = decay(before, {0: np.array([0.0, 0.9]), 1: np.zeros(2)})
    assert half["decay"][0] == 0.5
    assert half["decay_of_means"][0] == pytest.approx(1 - 0.9 / 1.4)
    assert half["sinks"].to_list() == [2, 0]


@pytest.fixture
def planted(tmp_path):
    folder = tmp_path / "model"
    model = models.build("qwen2_moe", num_hidden_layers=4)
    samples = [
        Sample(Document("0", "d", "x"), np.arange(4, 60).astype(np.uint32)),
    ]
    expert = int(by_site(seen(model, samples), "tokens")[1].argmax())
    plant(model, 1, expert, by=1e5)
    model.save_pretrained(folder)
    models.build_tokenizer().save_pretrained(folder)
    return folder, expert


def test_a_result_survives_its_file(planted, texts, tmp_path):
    folder, expert = planted
    found = super_experts(folder, texts, out=tmp_path / "super.json", context=32)
    assert found.found == [(1, expert)]
    again = load_super_experts(tmp_path / "super.json")
    assert again.experts.equals(found.experts)
    assert again.hidden.equals(found.hidden)
    assert (again.found, again.keep, again.rules) == (found.found, found.keep, found.rules)
    (tmp_path / "super.json").write_text('{"kind": "super_experts", "schema": 1}')
    with pytest.raises(DataError, match="damaged"):
        load_super_experts(tmp_path / "super.json")


def test_taking_experts_away_is_measured_beside_draws(planted, texts):
    folder, expert = planted
    done = super_experts(folder, texts, context=32, held_out=texts, seeds=2, write=4)
    effects = done.effects
    assert effects["set"].to_list() == ["none", "super", *("random", "random, same layers") * 2]
    assert effects["added"][0] == 0.0
    model = models.build("qwen2_moe", num_hidden_layers=4)
    drawn = effects.filter(pl.col("set") == "random, same layers")["experts"].to_list()
    assert all(layer == 1 and one != expert for ((layer, one),) in drawn)
    assert set(done.sinks["set"]) == {"super", "random", "random, same layers"}
    assert done.sinks.height == 5 * 4
    # The planted expert zeroed by hand loses as much.
    model = type(model).from_pretrained(folder)
    with torch.no_grad():
        find_moe_layers(model)[1].experts.down_proj[expert] = 0
    tokenizer = models.build_tokenizer()
    total = tokens = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer(text["text"])["input_ids"]])[:, :]
        for at in range(0, ids.shape[1] - 1, 31):
            window = ids[:, at : at + 32]
            with torch.no_grad():
                logits = model(input_ids=window).logits[0, :-1].double()
            total += float(
                torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum")
            )
            tokens += window.shape[1] - 1
    assert effects.filter(pl.col("set") == "super")["nll"][0] == pytest.approx(
        total / tokens, rel=1e-5
    )


def test_where_nothing_is_super_nothing_is_taken_away(model_folder, texts):
    found = super_experts(model_folder, texts, context=32, held_out=texts)
    assert found.found == found.outliers == []
    assert found.effects is found.sinks is None


@pytest.mark.parametrize(
    "rules", [{"layers": "late"}, {"percentile": 101.0}, {"ratio": 1.0}, {"reduction": "mean"}]
)
def test_bad_rules_are_refused(rules):
    with pytest.raises(SettingsError):
        Rules(**rules)


def test_dense_models_and_nan_are_refused(tmp_path, texts, model, samples):
    models.build_dense().save_pretrained(tmp_path / "dense")
    models.build_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match="dense"):
        super_experts(tmp_path / "dense", texts)
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float("nan")
    with pytest.raises(MoeCollabError, match="finite"):
        seen(model, samples)


def test_the_command_writes_what_plan_keeps(planted, texts, tmp_path, capsys):
    folder, expert = planted
    corpus = tmp_path / "texts.jsonl"
    corpus.write_text("\n".join(json.dumps(text) for text in texts))
    out = tmp_path / "run" / "super.json"
    run = CliRunner().invoke(
        app, ["super-experts", str(folder), str(corpus), "--out", str(out), "--context", "32"]
    )
    assert run.exit_code == 0, run.output
    assert f"super: layer 1 expert {expert}, " in run.output
    assert "Plotly" in out.with_suffix(".html").read_text()
    worst = -np.ones((4, models.N_EXPERTS))
    worst[1, expert] = -2.0  # dropped first, if it were not kept
    scores = make_scores(worst, top_k=2)
    assert expert not in mc.plan(scores, drop=0.25).keep[1]
    assert expert in mc.plan(scores, drop=0.25, keep=out).keep[1]
    with pytest.raises(DataError, match="neither a plan"):
        mc.plan(scores, drop_list=out)
