"""Models whose layers hold different numbers of experts: recorded, scored, planned, cut again."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import models
from moecollab.criteria.scores import Scores, load_scores
from moecollab.criteria.scoring import score
from moecollab.errors import DataError, PlanError, SchemaError, SettingsError, ShapeError
from moecollab.models.footprint import Footprint
from moecollab.models.groups import RouterGroups
from moecollab.models.keep import Keep, keep_from_json, read_keep
from moecollab.models.loading import load_model
from moecollab.models.masking import mask
from moecollab.models.routing import find_moe_layers
from moecollab.pruning.exporting import export_ranking
from moecollab.pruning.merging.merging import merge
from moecollab.pruning.planning import plan
from moecollab.pruning.plans import load_plan
from moecollab.pruning.pruning import prune
from moecollab.record.extraction import extract

FIRST = Keep({1: (0, 2, 5, 7), 2: (1, 3, 6)}, 8, 2)
"""What is kept of the whole model; layers then hold 4 and 3."""


@pytest.fixture
def base(tmp_path):
    return models.save("qwen3_moe", tmp_path / "base")


@pytest.fixture
def native(base, tmp_path):
    prune(base, FIRST, uneven="native", out=tmp_path / "native")
    return tmp_path / "native"


def uneven_scores(counts, seed=0, top_k=1, groups=None):
    """Random scores, some of them equal, of layers of these sizes."""
    values = np.random.default_rng(seed).integers(0, 9, (len(counts), max(counts))).astype(float)
    held = np.arange(max(counts)) < np.array(counts)[:, None]
    return Scores(
        criterion="frequency",
        values=np.where(held, values, 0),
        counts=held.astype(np.int64),
        layers=tuple(range(len(counts))),
        top_k=top_k,
        groups=groups,
        experts_per_layer=tuple(counts),
    )


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def original(kept):
    """Ids of the whole model for ids of the native one."""
    return {layer: tuple(FIRST.keep[layer][one] for one in ids) for layer, ids in kept.items()}


def test_scores_of_native_layers_are_those_of_the_masked_model(base, native, texts, tmp_path):
    few = extract(native, texts, out=tmp_path / "few", collect=["channels", "pairs"])
    mask(base, FIRST, out=tmp_path / "masked")
    many = extract(tmp_path / "masked", texts, out=tmp_path / "many", collect=["channels", "pairs"])
    for name in ("frequency", "reap", "gate_mean", "mone", "max_activation"):
        found, expected = score(name, few), score(name, many)
        assert found.experts_per_layer == (4, 3)
        assert found.n_sites == 7
        for row, ids in enumerate(FIRST.keep.values()):
            own = found.values[row, : len(ids)]
            np.testing.assert_allclose(own, expected.values[row, list(ids)], rtol=1e-4)
        assert found.values[1, 3] == 0


@pytest.mark.parametrize("given", ["folder", "loaded"])
def test_pruning_twice_is_pruning_once_by_the_union(
    given, base, native, texts, tmp_path, token_ids, logits
):
    scores = score("reap", extract(native, texts, out=tmp_path / "acts"))
    second = plan(scores, experts=5, per="model", out=tmp_path / "plan.json")
    once, twice = tmp_path / "once", tmp_path / "twice"
    with mask(native, tmp_path / "plan.json") as masked:
        expected = logits(masked.model, token_ids)
    model = native if given == "folder" else load_model(native)[0]
    prune(model, tmp_path / "plan.json", uneven="native", out=twice)
    union = original(second.keep)
    assert sorted(map(len, union.values())) == [2, 3]
    prune(base, Keep(union, 8, 2), uneven="native", out=once)
    assert weights_of(once).keys() == weights_of(twice).keys()
    for name, value in weights_of(once).items():
        assert torch.equal(weights_of(twice)[name], value), name
    counts = [json.loads((one / "config.json").read_text())["moecollab"] for one in (once, twice)]
    assert counts[0] == counts[1]
    found = logits(load_model(twice)[0], token_ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("given", ["folder", "loaded"])
def test_layers_brought_to_one_number_load_everywhere(
    given, native, texts, tmp_path, token_ids, logits
):
    model = native if given == "folder" else load_model(native)[0]
    scores = score("reap", extract(native, texts, out=tmp_path / "acts"))
    equal = plan(scores, experts=6, per="model").equalised()
    assert [len(kept) for kept in equal.keep.values()] == [3, 3]
    with mask(native, equal) as masked:
        expected = logits(masked.model, token_ids)
    prune(model, equal, out=tmp_path / "equal")
    assert "moecollab" not in json.loads((tmp_path / "equal" / "config.json").read_text())
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "equal"), token_ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert "| 2 | 3 | 3 | 0 |" in (tmp_path / "equal" / "README.md").read_text()


def test_every_criterion_that_reads_parameters_scores_native_layers(native, base):
    for name in ("aimer", "weight_norm", "router_norm", "stable_rank", "ews"):
        found, whole = score(name, model=native), score(name, model=base)
        assert found.values.shape == (2, 4)
        assert found.values[1, 3] == 0
        if name != "ews":  # which compares an expert with those that are there
            for row, ids in enumerate(FIRST.keep.values()):
                expected = whole.values[row, list(ids)]
                np.testing.assert_allclose(found.values[row, : len(ids)], expected, rtol=1e-6)


def test_experts_of_native_layers_are_merged(native, texts, tmp_path, token_ids, logits):
    acts = extract(native, texts, out=tmp_path / "acts", collect="channels")
    keep = plan(score("frequency", acts), experts=2)
    for how, text in {"hc_smoe": None, "ream": texts}.items():
        merged = merge(native, keep, how=how, activations=acts, corpus=text, out=tmp_path / how)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / how)
        assert [layer.n_experts for layer in find_moe_layers(again)] == [2, 2]
        torch.testing.assert_close(logits(again, token_ids), logits(merged, token_ids))


def test_padding_needs_enough_experts_of_its_own(tmp_path):
    model = models.build("deepseek_v3")
    prune(model, FIRST, uneven="native")
    keep = Keep({1: (0, 1, 2, 3), 2: (0, 1)}, 4, 2, experts_per_layer=(4, 3))
    with pytest.raises(PlanError, match="layer 2 cannot be padded to 4 experts, as it has 3"):
        prune(model, keep, uneven="pad")


def lowest(scores, room, n):
    """The `n` lowest of all experts, one by one, from layers that have room: the slow way."""
    counts, gone = list(scores.experts_per_layer), set()
    while len(gone) < n:
        values = scores.values
        free = [
            (values[row, expert], -row, -expert)
            for row in range(len(counts))
            for expert in range(counts[row])
            if (row, expert) not in gone and sum(one[0] == row for one in gone) < room[row]
        ]
        _, row, expert = min(free)
        gone.add((-row, -expert))
    return gone


@settings(max_examples=60)
@given(st.lists(st.integers(3, 7), min_size=2, max_size=4), st.integers(0, 99), st.data())
def test_plans_drop_the_lowest_of_the_experts_that_there_are(counts, seed, data):
    scores = uneven_scores((*counts, 2), seed)
    room = [count - 1 for count in (*counts, 2)]
    n = data.draw(st.integers(0, sum(room)))
    made = plan(scores, experts=scores.n_sites - n, per="model")
    gone = {(layer, one) for layer, ids in made.dropped.items() for one in ids}
    assert gone == lowest(scores, room, n)
    assert made.drop == n / scores.n_sites
    share = plan(scores, drop=0.3)
    for row, count in enumerate((*counts, 2)):
        order = sorted(range(count), key=lambda one, row=row: (scores.values[row, one], -one))
        expected = order[: int(0.3 * count + 0.5)]
        assert share.dropped[row] == tuple(sorted(expected))


@pytest.mark.parametrize("asked", [{"per": "entropy", "drop": 0.4}, {"mass": 0.6}])
def test_other_budgets_know_of_no_expert_that_is_not_there(asked):
    scores = uneven_scores((6, 4, 5), seed=3)
    made = plan(scores, **asked)
    assert made.n_sites == 15
    for layer, count in enumerate((6, 4, 5)):
        assert set(made.keep[layer]) | set(made.dropped[layer]) == set(range(count))
    if "mass" in asked:
        for row, ids in made.keep.items():
            total = scores.values[row].sum()
            assert scores.values[row, list(ids)].sum() >= 0.6 * total
            least = min(ids, key=lambda one, row=row: scores.values[row, one])
            assert scores.values[row, list(set(ids) - {least})].sum() < 0.6 * total


def test_by_similarity_no_layer_gives_up_what_it_lacks():
    scores = uneven_scores((4, 3), seed=1)
    alike = np.zeros((2, 4, 4))
    alike[1, :, 3] = alike[1, 3, :] = 9  # an expert that layer 1 does not have
    alike[0, 0, 1] = alike[0, 1, 0] = 1
    made = plan(scores, experts=6, per="similarity", similarity=alike)
    assert (len(made.keep[0]), len(made.keep[1])) == (3, 3)


def test_router_groups_lie_within_the_experts_of_a_layer():
    scores = uneven_scores((8, 4), groups=RouterGroups(2, 1))
    made = plan(scores, drop=0.5)
    for layer, size in ((0, 4), (1, 2)):
        inside = [sum(one // size == group for one in made.keep[layer]) for group in (0, 1)]
        assert inside == [size // 2] * 2
        for group in (0, 1):
            ids = range(group * size, (group + 1) * size)
            best = sorted(ids, key=lambda one, layer=layer: (-scores.values[layer, one], one))
            kept = {one for one in made.keep[layer] if one in ids}
            assert kept == set(best[: size // 2])


def test_files_of_uneven_layers(tmp_path):
    scores = uneven_scores((5, 3))
    scores.save(tmp_path / "scores.parquet")
    again = load_scores(tmp_path / "scores.parquet")
    assert again.experts_per_layer == (5, 3)
    assert again.values.tolist() == scores.values.tolist()
    assert again.table().height == again.n_sites == 8
    made = plan(again, drop=0.3, out=tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made
    assert read_keep(tmp_path / "plan.json") == read_keep(made)
    assert read_keep(made).counts == {0: 5, 1: 3}
    ranked = export_ranking(made, tmp_path / "ranking.jsonl")
    assert [sorted(ids) for ids in ranked.values()] == [[0, 1, 2, 3, 4], [0, 1, 2]]
    dropped = plan(again, drop_list=tmp_path / "plan.json").dropped
    assert dropped == made.dropped


def test_what_uneven_layers_refuse(tmp_path):
    scores = uneven_scores((5, 3))
    with pytest.raises(SettingsError, match=r"of expert ids in \[0, 3\)"):
        plan(scores, drop=0.2, keep={1: [3]})
    with pytest.raises(SettingsError, match="experts is 4; it must be at most the 3"):
        plan(scores, experts=4)
    with pytest.raises(SettingsError, match="floor is 4; it must be at most the 3 experts"):
        plan(scores, drop=0.2, floor=4)
    with pytest.raises(SettingsError, match="groups is 5; it must be a divisor of the 3"):
        plan(scores, drop=0.2, groups=5)
    protected = plan(scores, drop=0.2, keep={0: [0, 1, 2, 3]})
    with pytest.raises(PlanError, match="one layer has 3 experts and another protects more"):
        protected.equalised()
    with pytest.raises(PlanError, match="experts_per_layer has 3 numbers for 2 layers"):
        Keep({0: (0, 1), 1: (0, 1)}, 8, 2, experts_per_layer=(8, 7, 6))
    with pytest.raises(SchemaError, match="experts_per_layer that do not fit it"):
        keep_from_json({**FIRST.as_json(), "experts_per_layer": [8]}, "plan.json")
    value = json.loads(json.dumps(plan(scores, drop=0.2).as_json())) | {"experts_per_layer": [9, 3]}
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(PlanError, match=r"experts_per_layer \[9, 3\] for 2 layers of up to 5"):
        load_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(json.dumps(value | {"experts_per_layer": [5]}))
    with pytest.raises(DataError, match="is not a whole plan"):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("counts", [(3,), (2, 2), (4, 3), (3, 3, 3)])
def test_scores_of_layers_that_are_not_there_are_refused(counts):
    values = np.ones((2, 3))
    with pytest.raises(ShapeError, match=r"experts_per_layer of the scores is \["):
        Scores(
            criterion="frequency",
            values=values,
            counts=values.astype(np.int64),
            layers=(0, 1),
            top_k=1,
            experts_per_layer=counts,
        )


def test_memory_takes_the_same_share_of_layers_that_differ():
    scores, size = uneven_scores((8, 4), top_k=1), Footprint(expert=(1e9, 1e9), rest=0.0)
    kept = {}
    for memory in (12, 11, 10, 9, 8, 7, 6, 5, 4, 3):
        made = plan(scores, memory_gb=float(memory), model=size)
        kept[memory] = [len(ids) for ids in made.keep.values()]
        assert sum(kept[memory]) <= memory
    assert [kept[12], kept[11], kept[9], kept[6], kept[3]] == [
        [8, 4],
        [7, 4],
        [6, 3],
        [4, 2],
        [2, 1],
    ]
    for drop in (0.1, 0.25, 0.5, 0.75):
        by_share = [len(ids) for ids in plan(scores, drop=drop).keep.values()]
        assert kept[sum(by_share)] == by_share
    with pytest.raises(PlanError, match="left with per='layer' has 2 GB; raise memory_gb from 1 "):
        plan(scores, memory_gb=1.0, model=size)
