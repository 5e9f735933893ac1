"""Budgets of plans: every way to say how much, and how layers share it."""

import json
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import models
from moecollab.criteria.scores import load_scores
from moecollab.criteria.scoring import score
from moecollab.errors import (
    DataError,
    MissingInputError,
    PlanError,
    SettingsError,
    ShapeError,
    UnsupportedModelError,
)
from moecollab.models.footprint import Footprint
from moecollab.models.groups import RouterGroups, router_groups
from moecollab.models.keep import check_keep, read_keep
from moecollab.models.loading import load_model
from moecollab.models.routing import find_moe_layers
from moecollab.pruning.planning import plan
from moecollab.pruning.plans import load_plan
from moecollab.pruning.pruning import prune
from moecollab.pruning.sequences import by_entropy, by_similarity, entropies
from moecollab.pruning.units import make_units
from moecollab.record.extraction import extract
from scored import make_scores, planned


def counts(made):
    return [len(kept) for kept in made.keep.values()]


@st.composite
def positive_scores(draw):
    n_layers, n_groups, size = (draw(st.integers(1, 4)), draw(st.integers(1, 3)), None)
    size = draw(st.integers(1, 4))
    n = n_layers * n_groups * size
    values = draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    top_k = draw(st.integers(1, n_groups * size))
    least = -(-top_k // n_groups)
    groups = RouterGroups(n_groups, least) if n_groups > 1 else None
    return make_scores(np.reshape(values, (n_layers, n_groups * size)), top_k, groups)


# counts of experts


def test_experts_are_counted_by_layer_or_overall():
    scores = make_scores([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert plan(scores, experts=3).keep == {0: (1, 2, 3), 1: (1, 2, 3)}
    assert plan(scores, experts=5, per="model").keep == {0: (3,), 1: (0, 1, 2, 3)}
    assert plan(scores, experts=3).drop == 0.25


@given(positive_scores(), st.integers(1, 12))
def test_as_many_experts_stay_as_were_asked_for(scores, experts):
    n_groups = 1 if scores.groups is None else scores.groups.count
    wanted = min(experts * n_groups, scores.n_experts)
    made = planned(scores, experts=wanted)
    if made is not None:
        assert set(counts(made)) == {wanted}
        same = plan(scores, drop=1 - wanted / scores.n_experts)
        assert same.keep == made.keep


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({}, MissingInputError, "give one of drop, experts, mass, memory_gb .*, or drop_list"),
        ({"drop": 0.5, "experts": 2}, SettingsError, r"\['drop', 'experts'\]; it must be one of"),
        ({"drop": 0.1, "mass": 0.9}, SettingsError, "not several"),
        ({"experts": 0}, SettingsError, "experts is 0; it must be a whole number, 1 or more"),
        ({"experts": 2.5}, SettingsError, "experts is 2.5; it must be a whole number, 1 or more"),
        ({"experts": True}, SettingsError, "experts is True; it must be a whole number"),
        (
            {"drop": 25},
            SettingsError,
            r"drop is 25; it must be a share between 0 and 1; for 25 % write 0.25",
        ),
        ({"drop": float("nan")}, SettingsError, "drop is nan; it must be a share"),
        ({"drop": "0.5"}, SettingsError, "drop is '0.5'; it must be a share"),
        ({"experts": 9}, SettingsError, "experts is 9; it must be at most the 4 that"),
        ({"mass": 1.5}, SettingsError, r"mass is 1.5; it must be a share in \(0, 1\]"),
        ({"mass": 0.0}, SettingsError, r"mass is 0.0"),
        ({"memory_gb": 0.0}, SettingsError, "memory_gb is 0.0; it must be above 0"),
        ({"memory_gb": 1.0}, SettingsError, r"given for memory_gb \(--model\)"),
        ({"drop": 0.5, "floor": -1}, SettingsError, "floor is -1"),
        ({"drop": 0.5, "floor": 1.5}, SettingsError, "floor is 1.5; it must be a whole number, 0"),
        ({"drop": 0.5, "groups": 2.5}, SettingsError, "groups is 2.5; it must be a divisor of"),
        (
            {"drop": 0.5, "keep": {0: 0}},
            SettingsError,
            "keep is {0: 0}; it must be a path, or lists",
        ),
        ({"drop": 0.5, "keep": [0]}, SettingsError, r"keep is \[0\]; it must be a path, or lists"),
        ({"drop": 0.5, "keep": {0: "01"}}, SettingsError, "keep is {0: '01'}; it must be a path"),
        ({"drop": 0.5, "keep": {0: [1.5]}}, SettingsError, r"keep is {0: \[1.5\]}; it must be a"),
        ({"drop_list": {1: 0}}, SettingsError, "drop_list is {1: 0}; it must be a path, or lists"),
        (
            {"drop_list": {9: [0]}},
            SettingsError,
            r"drop_list is {9: \(0,\)}; it must be of the MoE",
        ),
        (
            {"drop_list": {1: [4]}},
            SettingsError,
            r"{1: \(4,\)}; it must be of expert ids in \[0, 4",
        ),
        ({"drop": 0.5, "floor": 5}, SettingsError, "floor is 5; it must be at most the 4"),
        ({"drop": 0.5, "groups": 3}, SettingsError, "groups is 3; it must be a divisor of the 4"),
        ({"drop": 0.5, "per": "similarity"}, SettingsError, "similarity is None"),
        (
            {"experts": 1},
            PlanError,
            "would keep 1 experts but the router selects top_k=2; raise ex",
        ),
        ({"experts": 3, "groups": 2}, SettingsError, "a multiple of the 2 router groups"),
        ({"experts": 3, "per": "model"}, PlanError, "raise experts to 4 or more"),
        ({"drop": 0.5, "floor": 3}, PlanError, "layer 0 would keep 2 experts but the floor is 3"),
        (
            {"drop": 0.25, "drop_list": {0: [1, 2]}},
            PlanError,
            "layer 0 would drop 1 experts but th",
        ),
        (
            {"drop": 0.25, "per": "model", "drop_list": {0: [1, 2], 1: [3]}},
            PlanError,
            "the model would drop 2 experts but the drop-list takes 3",
        ),
        (
            {"drop_list": {1: [0, 1, 2]}},
            PlanError,
            "layer 1 must drop 3 experts but can do without",
        ),
        ({"drop": 0.5, "keep": {0: [1]}, "drop_list": {0: [1]}}, SettingsError, "layer 0 expert 1"),
        ({"mass": 0.3, "drop_list": {0: [3]}, "keep": {0: [0, 1, 2]}}, None, ""),
        ({"mass": 0.9, "drop_list": {0: [3]}}, PlanError, "layer 0 would drop 0 experts but"),
    ],
)
def test_budgets_that_cannot_be(asked, error, message):
    scores = make_scores([[1, 1, 2, 4], [1, 2, 3, 4]], top_k=2)
    if error is None:
        assert plan(scores, **asked).keep[0] == (0, 1, 2)
        return
    with pytest.raises(error, match=message):
        plan(scores, **asked)


# floors and lists


def test_a_floor_is_paid_elsewhere():
    scores = make_scores([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert plan(scores, drop=0.5, per="model").keep == {0: (3,), 1: (1, 2, 3)}
    assert plan(scores, drop=0.5, per="model", floor=2).keep == {0: (2, 3), 1: (2, 3)}


def test_a_drop_list_alone_is_the_plan():
    made = plan(make_scores(np.ones((2, 4))), drop_list={1: [0, 2]})
    assert made.dropped == {0: (), 1: (0, 2)}
    assert made.drop == 0.25


@pytest.mark.parametrize("per", ["layer", "model", "entropy"])
def test_a_drop_list_counts_towards_the_budget(per):
    scores = make_scores([[9, 1, 2, 3], [4, 5, 6, 7]])
    made = plan(scores, drop=0.5, per=per, drop_list={0: [0]})
    assert 0 in made.dropped[0]
    assert made.n_dropped == 4
    if per == "layer":
        assert made.dropped == {0: (0, 1), 1: (0, 1)}


def test_lists_are_read_from_files(tmp_path):
    scores = make_scores([[1, 2, 3, 4], [5, 6, 7, 8]])
    (tmp_path / "held.json").write_text(json.dumps({"0": [0]}))
    assert plan(scores, drop=0.5, keep=tmp_path / "held.json").keep[0] == (0, 3)
    first = plan(scores, drop=0.25, out=tmp_path / "plan.json")
    again = plan(scores, drop=0.5, drop_list=tmp_path / "plan.json")
    assert all(set(first.dropped[i]) < set(again.dropped[i]) for i in (0, 1))
    assert plan(scores, drop=0.25, keep=tmp_path / "plan.json").keep == first.keep
    for odd in ({"zero": [0]}, {"0": 0}, {"0": [1.5]}, {"0": "01"}):
        (tmp_path / "odd.json").write_text(json.dumps(odd))
        with pytest.raises(DataError, match="neither a plan nor of experts by layer"):
            plan(scores, drop=0.5, keep=tmp_path / "odd.json")


# shares of the scores


def test_mass_keeps_the_smallest_set_that_holds_it():
    scores = make_scores([[4, 3, 2, 1], [10, 0, 0, 0]])
    assert plan(scores, mass=0.7).keep == {0: (0, 1), 1: (0,)}
    assert plan(scores, mass=0.71).keep == {0: (0, 1, 2), 1: (0,)}
    assert plan(scores, mass=1.0).keep == {0: (0, 1, 2, 3), 1: (0,)}
    assert plan(scores, mass=0.5, per="model").keep == {0: (0,), 1: (0,)}
    assert plan(scores, mass=0.86, per="model").keep == {0: (0, 1, 2), 1: (0,)}
    assert plan(make_scores([[0, 0, 0, 0]]), mass=0.5).keep == {0: (0, 1)}


@given(positive_scores(), st.floats(0.01, 1))
def test_no_smaller_set_holds_the_mass(scores, mass):
    """Against every set of experts, but for the floor; per layer, without router groups."""
    free = make_scores(scores.values, 1)
    made = plan(free, mass=mass)
    for row, kept in zip(free.values, made.keep.values(), strict=True):
        shares = row / row.sum() if row.any() else np.full(len(row), 1 / len(row))
        assert shares[list(kept)].sum() >= mass - 1e-9
        smaller = combinations(range(len(row)), len(kept) - 1)
        assert all(shares[list(one)].sum() < mass + 1e-9 for one in smaller)


def test_mass_needs_scores_that_are_not_negative():
    with pytest.raises(DataError, match="score of layer 0 expert 1 is -2; use drop or experts"):
        plan(make_scores([[1, -2]]), mass=0.5)
    with pytest.raises(DataError, match="per='entropy' needs shares"):
        plan(make_scores([[1, -2]]), drop=0.5, per="entropy")


def test_a_plan_by_mass_protects_its_experts_in_another():
    shares, other = make_scores([[6, 1, 1, 2]]), make_scores([[1, 2, 3, 4]])
    assert plan(other, drop=0.5, keep=plan(shares, mass=0.2).keep).keep == {0: (0, 3)}


# gigabytes


def test_the_largest_plan_that_fits_is_made():
    scores = make_scores([[1, 2, 3, 4], [5, 6, 7, 8]])
    size = Footprint(expert=(1e9, 2e9), rest=1e9)
    assert plan(scores, memory_gb=13.0, model=size).n_dropped == 0
    assert plan(scores, memory_gb=12.9, model=size).keep == {0: (1, 2, 3), 1: (1, 2, 3)}
    assert plan(scores, memory_gb=7.0, model=size).keep == {0: (2, 3), 1: (2, 3)}
    made = plan(scores, memory_gb=10.0, model=size, per="model")
    assert made.keep == {0: (3,), 1: (0, 1, 2, 3)}
    assert plan(scores, memory_gb=9.9, model=size, per="model").keep == {0: (3,), 1: (1, 2, 3)}


@pytest.mark.parametrize("per", ["layer", "model", "entropy"])
def test_the_next_plan_would_not_fit(per):
    rng = np.random.default_rng(0)
    scores = make_scores(rng.random((3, 8)), top_k=2)
    size = Footprint(expert=(3e8, 1e8, 2e8), rest=5e8)
    for memory in np.linspace(1.8, 5.3, 30):
        made = plan(scores, memory_gb=float(memory), model=size, per=per)
        left = size.rest + np.dot(size.expert, counts(made))
        assert left <= memory * 1e9 + 1e-3
        more = counts(made)
        assert made.n_dropped == 0 or left + (6e8 if per == "layer" else 3e8) > memory * 1e9, more


def test_memory_that_is_too_small_says_what_is_possible():
    scores = make_scores(np.arange(8.0).reshape(2, 4), top_k=2)
    size = Footprint(expert=(1e9, 2e9), rest=1e9)
    for per in ("layer", "model"):
        with pytest.raises(PlanError, match="raise memory_gb from 3 to 7 or more"):
            plan(scores, memory_gb=3.0, model=size, per=per)
        assert counts(plan(scores, memory_gb=7.0, model=size, per=per)) == [2, 2]
    with pytest.raises(ShapeError, match="has 1 MoE layers, but the scores are of 2"):
        plan(scores, memory_gb=3.0, model=Footprint(expert=(1e9,), rest=0.0))


@pytest.mark.parametrize(
    ("memory", "of_layers", "of_model"),
    [(99, [0, 2], 2), (7, [0, 2], 2), (6.9, [1, 2], 3), (4, [3, 3], 5)],
)
def test_memory_is_a_limit_and_a_drop_list_goes_whatever_fits(memory, of_layers, of_model):
    """Eight experts of 1 GB each; the drop-list takes two of one layer."""
    asked = {
        "memory_gb": float(memory),
        "model": Footprint(expert=(1e9, 1e9), rest=1e9),
        "drop_list": {1: [2, 3]},
    }
    scores = make_scores([[1, 2, 3, 4], [5, 6, 7, 8]])
    even, free = plan(scores, **asked), plan(scores, per="model", **asked)
    assert counts(even) == [4 - n for n in of_layers]
    assert free.n_dropped == of_model
    assert {2, 3} <= set(even.dropped[1])
    assert {2, 3} <= set(free.dropped[1])


def test_a_list_of_one_layer_leaves_what_is_kept_in_another():
    """It was an error that told to lower a drop that nobody had given."""
    asked = {"model": Footprint(expert=(1e9, 1e9), rest=1e9), "keep": {0: [0, 1, 2]}}
    scores = make_scores([[1, 2, 3, 4], [5, 6, 7, 8]])
    made = plan(scores, memory_gb=99.0, drop_list={1: [2, 3]}, **asked)
    assert made.dropped == {0: (), 1: (2, 3)}
    assert plan(scores, memory_gb=6.0, drop_list={1: [2, 3]}, **asked).dropped[0] == (3,)
    with pytest.raises(PlanError, match="raise memory_gb from 5 to 6 or more"):
        plan(scores, memory_gb=5.0, drop_list={1: [2, 3]}, **asked)


def brute_force(scores, size, memory, listed):
    """The first number of experts that, or the list, leaves what fits: one after the other."""
    for n in range(scores.n_experts - scores.top_k + 1):
        gone = [max(n, len(listed.get(layer, ()))) for layer in scores.layers]
        if size.rest + np.dot(size.expert, scores.n_experts - np.array(gone)) <= memory * 1e9:
            return gone
    return None


def test_layers_of_other_sizes_and_lists_fit_as_by_trying():
    rng = np.random.default_rng(0)
    scores, size = make_scores(rng.random((3, 8)), 2), Footprint((3e8, 1e8, 2e8), 5e8)
    listed = {0: [1], 2: [0, 3, 5, 6]}
    for memory in np.linspace(1.8, 5.3, 30):
        wanted = brute_force(scores, size, memory, listed)
        made = plan(scores, memory_gb=float(memory), model=size, drop_list=listed)
        assert counts(made) == [8 - n for n in wanted]


def test_numbers_of_numpy_are_planned_and_written(tmp_path):
    scores = make_scores([[1, 2, 3, 4], [5, 6, 7, 8]])
    for name, asked in [("drop", np.float32(0.25)), ("experts", np.int64(3))]:
        made = plan(scores, out=tmp_path / f"{name}.json", **{name: asked})
        assert load_plan(tmp_path / f"{name}.json") == made
        assert counts(made) == [3, 3]
    assert plan(scores, drop=0.25, keep={0: np.array([0])}).keep[0] == (0, 2, 3)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_footprint_is_what_the_files_hold(family, tmp_path):
    folder = models.save(family, tmp_path / "whole")
    whole = Footprint.of(str(folder))
    held = Footprint.of(models.build(family))
    assert whole == held
    layers = [layer.layer for layer in find_moe_layers(models.build(family))]
    scores = make_scores(np.arange(8.0 * len(layers)).reshape(-1, 8), 2, layers=layers)
    made = plan(scores, experts=5)
    prune(str(folder), made, out=tmp_path / "cut")
    left = (tmp_path / "cut" / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "cut" / "model.safetensors").read_bytes()[:8], "little")
    assert left - header - 8 == whole.rest + 5 * sum(whole.expert)
    limit = (left - header - 8) / 1e9
    assert counts(plan(scores, memory_gb=limit, model=str(folder))) == [5] * len(layers)


def test_footprint_of_packed_weights_is_not_guessed(tmp_path):
    folder = models.save("mixtral", tmp_path / "packed")
    packed = {"blocks": np.zeros(1_000_000, np.uint8)}
    save_file(load_file(folder / "model.safetensors") | packed, folder / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"holds packed weights \(torch.uint8\)"):
        Footprint.of(str(folder))


# router groups


def test_every_router_group_keeps_as_many():
    scores = make_scores([[9, 8, 7, 6, 1, 2, 3, 4]], top_k=2, groups=RouterGroups(2, 2))
    assert plan(scores, drop=0.5).keep == {0: (0, 1, 6, 7)}
    assert plan(scores, experts=6).keep == {0: (0, 1, 2, 5, 6, 7)}
    assert plan(scores, mass=0.8).keep == {0: (0, 1, 2, 5, 6, 7)}
    with pytest.raises(
        PlanError, match="layer 0 would keep 2 experts but 4 are protected or needed"
    ):
        plan(scores, experts=2)


def test_groups_of_two_layers_compete_by_the_sum_of_a_unit():
    values = [[1, 9, 5, 9], [3, 9, 2, 9]]  # units of the smallest: 1 + 5 and 3 + 2
    scores = make_scores(values, groups=RouterGroups(2, 1))
    assert plan(scores, drop=0.25, per="model").dropped == {0: (), 1: (0, 2)}


@given(positive_scores(), st.floats(0, 0.9), st.sampled_from(["layer", "model", "entropy"]))
def test_groups_always_keep_equal_numbers(scores, drop, per):
    made = planned(scores, drop=drop, per=per)
    if made is None or scores.groups is None:
        return
    size = scores.n_experts // scores.groups.count
    for kept in made.keep.values():
        held = np.bincount(np.array(kept) // size, minlength=scores.groups.count)
        assert len(set(held.tolist())) == 1
        assert held[0] >= scores.groups.least
    even = made.equalised()
    assert even.uniform
    assert {len(kept) % scores.groups.count for kept in even.keep.values()} == {0}


def test_protected_experts_of_a_group_stay():
    scores = make_scores([[9, 8, 7, 6, 1, 2, 3, 4]], groups=RouterGroups(2, 1))
    made = plan(scores, drop=0.5, keep={0: [4]})
    assert made.keep == {0: (0, 1, 4, 7)}
    with pytest.raises(PlanError, match="layer 0 would keep 2 experts but 4 are protected"):
        plan(scores, drop=0.75, keep={0: [4, 5]})


def test_groups_are_known_from_the_model(tmp_path):
    model = models.build("deepseek_v3", n_group=2, topk_group=1)
    layers = find_moe_layers(model)
    assert router_groups(layers[0]) == RouterGroups(2, 2)
    values = np.random.default_rng(0).random((len(layers), 8))
    numbers = [layer.layer for layer in layers]
    numbered = make_scores(values, 2, RouterGroups(2, 2), layers=numbers)
    numbered.save(tmp_path / "scores.parquet")
    assert load_scores(tmp_path / "scores.parquet").groups == RouterGroups(2, 2)
    for per in ("layer", "model", "entropy"):
        made = plan(numbered, drop=0.5, per=per, out=tmp_path / f"{per}.json")
        check_keep(read_keep(made), layers)
        assert load_plan(tmp_path / f"{per}.json") == made
    with pytest.raises(SettingsError, match="groups is 4; it must be 2, as was recorded"):
        plan(numbered, drop=0.5, groups=4)
    free = make_scores(values, 2, layers=numbers)
    assert plan(free, drop=0.5, groups=2).keep == plan(numbered, drop=0.5).keep
    assert router_groups(find_moe_layers(models.build("mixtral"))[0]) is None


# sharing by entropy or similarity


def test_layers_keep_in_proportion_to_the_spread_of_their_scores():
    """exp(H) is 8 and 2: of 10 experts, 8 and 2 stay."""
    scores = make_scores([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0]])
    assert np.exp(entropies(scores.values)) == pytest.approx([8, 2])
    assert counts(plan(scores, experts=10, per="entropy")) == [8, 2]
    assert counts(plan(scores, experts=5, per="entropy")) == [4, 1]
    assert counts(plan(scores, experts=5, per="entropy", floor=2)) == [3, 2]


@given(positive_scores(), st.floats(0, 0.9), st.floats(0, 0.9))
def test_less_budget_keeps_some_of_the_same(scores, first, second):
    less, more = (planned(scores, drop=d, per="entropy") for d in sorted((first, second)))
    if less is not None and more is not None:
        assert all(set(less.dropped[i]) <= set(more.dropped[i]) for i in scores.layers)


def test_an_entropy_budget_is_close_to_proportional():
    rng = np.random.default_rng(1)
    scores = make_scores(rng.gamma(0.3, size=(6, 64)))
    spread = np.exp(entropies(scores.values))
    kept = np.array(counts(plan(scores, experts=90, per="entropy")))
    assert kept.sum() == 90
    assert np.abs(kept - 90 * spread / spread.sum()).max() <= 1


def alike(n_layers, n_experts, pairs):
    """Similarities of 0.1 but for some."""
    found = np.full((n_layers, n_experts, n_experts), 0.1)
    for layer, one, other, value in pairs:
        found[layer, one, other] = found[layer, other, one] = value
    return found


def units_of(scores, top_k=1):
    none = np.zeros(scores.shape, dtype=bool)
    counts = (scores.shape[1],) * len(scores)
    return make_units(scores, none, none, counts=counts, n_groups=1, least=top_k)


def test_the_layer_that_is_most_alike_gives_first():
    """By hand: the similarities of the layers add up to 2.3, 1.1 and 0.6."""
    similarity = alike(3, 4, [(0, 0, 1, 0.9), (0, 2, 3, 0.9), (0, 0, 2, 0.2), (1, 0, 1, 0.6)])
    similarity[2] = 0.1
    order = by_similarity(units_of(np.zeros((3, 4))), similarity, gamma=0.99)
    # 0 without expert 1: 0.9 + 0.2 + 0.1 = 1.2, without 3 then: 0.2; 1 without 1: 0.3; 2: 0.6
    assert order[:5].tolist() == [0, 0, 1, 2, 2]


def test_a_layer_rests_when_the_shares_become_uneven():
    similarity = np.stack([np.full((8, 8), 0.9), np.full((8, 8), 0.1)])
    free = by_similarity(units_of(np.zeros((2, 8))), similarity, gamma=0.99)
    fair = by_similarity(units_of(np.zeros((2, 8))), similarity, gamma=0.02)
    # 0.9 · 3 pairs of 3 experts are less than 0.1 · 28 pairs of 8
    assert free[:6].tolist() == [0, 0, 0, 0, 0, 1]
    # H of (8 - n, 8) / (16 - n) in units of log 2: .997, .985, .961 for n = 1, 2, 3
    assert fair[:4].tolist() == [0, 0, 0, 1]


def test_similarity_decides_how_many_and_scores_which():
    scores = make_scores([[1, 2, 3, 4], [5, 6, 7, 8]])
    similarity = np.stack([np.full((4, 4), 0.1), np.full((4, 4), 0.9)])
    made = plan(scores, drop=0.25, per="similarity", similarity=similarity)
    assert made.dropped == {0: (), 1: (0, 1)}
    for wrong, error, message in [
        (similarity[:1], ShapeError, r"shape \(1, 4, 4\) or is not finite, expected \(2, 4, 4\)"),
        (similarity * np.arange(4), DataError, "not symmetric"),
    ]:
        with pytest.raises(error, match=message):
            plan(scores, drop=0.25, per="similarity", similarity=wrong)


def test_similarity_is_read_from_a_file(tmp_path):
    scores, similarity = make_scores(np.ones((2, 4))), np.ones((2, 4, 4))
    np.save(tmp_path / "alike.npy", similarity)
    asked = {"experts": 5, "per": "similarity"}
    read = plan(scores, similarity=tmp_path / "alike.npy", **asked)
    assert read == plan(scores, similarity=similarity, **asked)
    with pytest.raises(DataError, match=r"not a readable .npy file"):
        plan(scores, similarity=tmp_path / "none.npy", **asked)


def test_sequences_name_every_unit_that_can_go():
    rng = np.random.default_rng(2)
    values = rng.random((3, 6))
    units = units_of(values, top_k=2)
    similarity = np.ones((3, 6, 6))
    for order in (by_entropy(units, values, values >= 0), by_similarity(units, similarity)):
        assert np.bincount(order).tolist() == [4, 4, 4]


# plans remember what was asked for


@pytest.mark.parametrize(
    "asked", [{"mass": 0.7}, {"experts": 3}, {"drop": 0.5, "floor": 2}, {"drop_list": {0: [1]}}]
)
def test_a_plan_remembers_its_budget(asked, tmp_path):
    scores = make_scores([[1, 2, 3, 4], [5, 6, 7, 8]])
    made = plan(scores, out=tmp_path / "plan.json", **asked)
    asked.pop("drop_list", None)
    assert load_plan(tmp_path / "plan.json") == made
    assert made.budget.as_json() == asked
    assert plan(scores, drop=0.5).budget is None


def test_scores_for_one_drop_take_budgets_near_it():
    scores = make_scores([[3, 1, 2, 4]], settings={"drop": 0.25})
    assert plan(scores, experts=3).n_dropped == 1
    with pytest.raises(PlanError, match=r"hold for drop=0.25, not 0.5; score again"):
        plan(scores, experts=2)


@given(positive_scores(), st.lists(st.floats(0.01, 1), min_size=2, max_size=4))
def test_more_mass_keeps_more_of_the_same(scores, shares):
    for per in ("layer", "model", "entropy"):
        made = [plan(scores, mass=mass, per=per).keep for mass in sorted(shares)]
        for less, more in pairwise(made):
            assert all(set(less[i]) <= set(more[i]) for i in scores.layers)


def test_recordings_know_the_router_groups(tmp_path, texts):
    folder = models.save("deepseek_v3", tmp_path / "model", n_group=2, topk_group=1)
    acts = extract(folder, texts, out=tmp_path / "acts")
    assert acts.router_groups == RouterGroups(2, 2)
    scores = score("frequency", acts)
    assert scores.groups == RouterGroups(2, 2)
    check_keep(
        read_keep(plan(scores, drop=0.25, per="model")), find_moe_layers(load_model(folder)[0])
    )
    weighed = score("weight_norm", model=str(folder))
    assert weighed.groups == RouterGroups(2, 2)
