"""Plans: budgets, floors, protection, ties, files."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moecollab.errors import (
    DataError,
    MissingInputError,
    OutputExistsError,
    PlanError,
    SchemaError,
    SettingsError,
)
from moecollab.pruning.planning import plan
from moecollab.pruning.plans import Plan, load_plan, plan_from_json
from scored import make_scores, planned


@st.composite
def score_sets(draw, distinct=False):
    n_layers, n_experts = draw(st.integers(1, 5)), draw(st.integers(2, 9))
    top_k = draw(st.integers(1, n_experts))
    n = n_layers * n_experts
    if distinct:
        values = draw(st.permutations(range(n)))
    else:
        values = draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    return make_scores(np.reshape(values, (n_layers, n_experts)), top_k)


drops = st.floats(0, 1, exclude_max=True)


def test_lowest_scores_of_each_layer_go():
    made = plan(make_scores([[3, 1, 2, 4], [1, 2, 3, 4]], layers=(1, 3)), drop=0.5)
    assert made.keep == {1: (0, 3), 3: (2, 3)}
    assert made.dropped == {1: (1, 2), 3: (0, 1)}
    assert (made.n_dropped, made.n_sites, made.uniform) == (4, 8, True)


def test_lowest_scores_of_the_model_go():
    made = plan(make_scores([[1, 2, 3, 4], [5, 6, 7, 8]]), drop=0.25, per="model")
    assert made.keep == {0: (2, 3), 1: (0, 1, 2, 3)}
    assert not made.uniform


def test_floor_of_a_layer_is_paid_elsewhere():
    made = plan(make_scores([[1, 2, 3, 4], [5, 6, 7, 8]], top_k=2), drop=0.5, per="model")
    assert made.keep == {0: (2, 3), 1: (2, 3)}


@pytest.mark.parametrize("per", ["layer", "model"])
def test_ties_keep_the_smaller_expert(per):
    made = plan(make_scores(np.zeros((1, 6))), drop=0.5, per=per)
    assert made.keep == {0: (0, 1, 2)}


@pytest.mark.parametrize("per", ["layer", "model"])
def test_protected_experts_stay(per):
    scores = make_scores([[0, 1, 2, 3], [9, 8, 7, 6]])
    made = plan(scores, drop=0.5, per=per, keep={0: [1, 0]})
    assert made.keep[0][:2] == (0, 1)
    assert made.n_dropped == 4
    assert made.protected == {0: (0, 1)}


def test_halves_round_up():
    scores = make_scores(np.arange(10).reshape(2, 5))
    assert plan(scores, drop=0.1).n_dropped == 2
    assert plan(scores, drop=0.25, per="model").n_dropped == 3


@pytest.mark.parametrize(
    ("per", "top_k", "keep", "message"),
    [
        ("layer", 4, None, r"layer 0 would keep 2 experts but the router selects top_k=4; lower"),
        (
            "layer",
            1,
            {1: [0, 1, 2, 3, 4]},
            r"layer 1 would keep 2 experts but 5 are protected or ne",
        ),
        (
            "model",
            4,
            None,
            r"12 of 16 experts would go but only 8 can, as every .* \(top_k=4\); low",
        ),
        (
            "model",
            1,
            {1: range(8)},
            r"12 of 16 experts would go but only 7 can, as every layer keeps what",
        ),
        (
            "model",
            1,
            {0: [7], 1: range(7)},
            r"12 of 16 experts would go but only 8 can",
        ),
    ],
)
def test_impossible_budget_says_what_is_possible(per, top_k, keep, message):
    scores = make_scores(np.arange(16).reshape(2, 8), top_k)
    with pytest.raises(PlanError, match=message) as caught:
        plan(scores, drop=0.75, per=per, keep=keep)
    advised = float(str(caught.value).split("drop to ")[1].split(" ")[0])
    assert plan(scores, drop=advised, per=per, keep=keep).n_dropped > 0


@pytest.mark.parametrize("drop", [-0.1, 1.0, math.nan, 7])
def test_drop_out_of_range(drop):
    with pytest.raises(SettingsError, match=r"drop is .*; it must be a share between 0 and 1"):
        plan(make_scores([[1, 2]]), drop=drop)


def test_other_wrong_settings():
    scores = make_scores([[1, 2]])
    with pytest.raises(SettingsError, match="per is 'expert'; it must be 'layer' or 'model'"):
        plan(scores, drop=0, per="expert")
    with pytest.raises(SettingsError, match=r"keep is {5: \(0,\)}; it must be of the MoE layers"):
        plan(scores, drop=0, keep={5: [0]})
    with pytest.raises(SettingsError, match=r"it must be of expert ids in \[0, 2\)"):
        plan(scores, drop=0, keep={0: [2]})


def test_nan_scores_never_reach_a_plan():
    with pytest.raises(DataError, match="frequency score of layer 0 expert 1 is nan"):
        plan(make_scores([[1, math.nan]]), drop=0.5)


@given(score_sets(), drops, st.sampled_from(["layer", "model"]))
def test_budget_is_exact_and_floors_hold(scores, drop, per):
    made = planned(scores, drop=drop, per=per)
    if per == "layer":
        wanted = scores.n_layers * math.floor(drop * scores.n_experts + 0.5)
    else:
        wanted = math.floor(drop * scores.n_sites + 0.5)
    possible = scores.n_layers * (scores.n_experts - scores.top_k)
    assert (made is None) == (wanted > possible)
    if made is not None:
        assert made.n_dropped == wanted
        assert min(map(len, made.keep.values())) >= scores.top_k


@given(score_sets(), drops, drops, st.sampled_from(["layer", "model"]))
def test_a_larger_drop_drops_more_of_the_same(scores, first, second, per):
    less, more = (planned(scores, drop=drop, per=per) for drop in sorted((first, second)))
    if less is not None and more is not None:
        assert all(set(less.dropped[i]) <= set(more.dropped[i]) for i in scores.layers)


@given(score_sets(), drops, st.sampled_from(["layer", "model"]), st.data())
def test_protected_experts_always_stay(scores, drop, per, data):
    experts = st.lists(st.integers(0, scores.n_experts - 1))
    keep = data.draw(st.dictionaries(st.sampled_from(scores.layers), experts))
    made = planned(scores, drop=drop, per=per, keep=keep)
    if made is not None:
        assert all(set(held) <= set(made.keep[layer]) for layer, held in keep.items())
        assert not made.scores.flags.writeable


@given(score_sets(distinct=True), drops, st.sampled_from(["layer", "model"]), st.randoms())
def test_relabelled_experts_get_a_relabelled_plan(scores, drop, per, random):
    order = list(range(scores.n_experts))
    random.shuffle(order)
    made = planned(scores, drop=drop, per=per)
    other = planned(make_scores(scores.values[:, order], scores.top_k), drop=drop, per=per)
    assert (made is None) == (other is None)
    if made is not None:
        for layer in scores.layers:
            assert {order[expert] for expert in other.keep[layer]} == set(made.keep[layer])


@given(score_sets(), drops)
def test_no_kept_expert_outranks_a_dropped_one_below_the_floor(scores, drop):
    """Every dropped score is at most every kept score of layers above their floor."""
    made = planned(scores, drop=drop, per="model")
    if made is None:
        return
    rows = zip(scores.layers, scores.values, strict=True)
    spare = [row[list(made.keep[i])].min() for i, row in rows if len(made.keep[i]) > scores.top_k]
    gone = [scores.values[i][list(ids)].max() for i, ids in made.dropped.items() if ids]
    if spare and gone:
        assert max(gone) <= min(spare)


@given(score_sets(), drops)
def test_equalised_plans_are_uniform_and_close(scores, drop):
    made = planned(scores, drop=drop, per="model")
    if made is None:
        return
    even = made.equalised()
    assert even.uniform
    assert abs(even.n_dropped - made.n_dropped) <= scores.n_layers / 2
    assert even.equalised() is even
    if not made.uniform:
        assert even == plan(scores, drop=even.drop, per="layer")


def test_equalised_keeps_protected_experts():
    scores = make_scores([[0, 1, 2, 3], [6, 7, 8, 9]])
    made = plan(scores, drop=0.5, per="model", keep={0: [0, 1, 2]})
    assert made.keep == {0: (0, 1, 2), 1: (3,)}
    assert made.equalised().keep == {0: (0, 1, 2), 1: (1, 2, 3)}


def test_equalised_needs_scores():
    bare = Plan(
        keep={0: (0,), 1: (0, 1)}, n_experts=2, top_k=1, criterion="mine", drop=0.25, per="model"
    )
    with pytest.raises(MissingInputError, match="holds no scores"):
        bare.equalised()


@given(score_sets(), drops)
def test_equal_settings_make_equal_plans(scores, drop):
    assert planned(scores, drop=drop) == planned(scores, drop=drop)


@pytest.mark.parametrize("per", ["layer", "model"])
def test_file_round_trip(tmp_path, per):
    path = tmp_path / "plan.json"
    scores = make_scores(np.linspace(0, 1 / 3, 48).reshape(12, 4), layers=range(1, 13))
    made = plan(scores, drop=0.3, per=per, keep={11: [0]}, out=path)
    found = load_plan(path)
    assert found == made
    assert np.array_equal(found.scores, made.scores)
    text = path.read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=1) + "\n"
    with pytest.raises(OutputExistsError, match="exists"):
        plan(scores, drop=0.3, out=path)
    plan(scores, drop=0.0, out=path, overwrite=True)
    assert load_plan(path).n_dropped == 0


def test_plan_reads_scores_from_a_file(tmp_path):
    scores = make_scores([[3, 1, 2, 4]])
    scores.save(tmp_path / "scores.parquet")
    assert plan(tmp_path / "scores.parquet", drop=0.5) == plan(scores, drop=0.5)


def test_damaged_files(tmp_path):
    path = tmp_path / "plan.json"
    plan(make_scores([[3, 1, 2, 4]], top_k=2), drop=0.5, out=path)
    good = json.loads(path.read_text())
    for change, error, message in [
        ({"kind": "scores"}, SchemaError, "expected plan version 1"),
        ({"keep": {"0": [3]}}, PlanError, "layer 0 would keep 1 experts but the router"),
        ({"keep": {"0": [3, 9]}}, PlanError, r"must be ascending and in \[0, 4\)"),
        ({"keep": {}}, PlanError, "layers are empty"),
        ({"keep": [1]}, DataError, "not a whole plan"),
        ({"keep": {"x": [1, 2]}}, DataError, "not a whole plan"),
        ({"n_experts": None}, DataError, "not a whole plan"),
        ({"protected": {"0": [1]}}, PlanError, "drops an expert it protects"),
        ({"settings": good["settings"] | {"per": "all"}}, SettingsError, "per is 'all'"),
        ({"settings": good["settings"] | {"drop": 1.5}}, SettingsError, r"drop is 1.5"),
        ({"scores": [[1.0]]}, DataError, r"scores of shape \(1, 1\)"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(error, match=message):
            load_plan(path)
    with pytest.raises(DataError, match="does not exist"):
        load_plan(tmp_path / "none.json")


def test_repr_says_what_goes():
    made = plan(make_scores([[1, 2, 3, 4], [5, 6, 7, 8]]), drop=0.25, per="model")
    assert repr(made) == (
        "Plan(frequency, per model: drops 2 of 8 experts, keeps 2 to 4 of 4 in each of 2 layers)"
    )


def test_dropping_nothing_keeps_everyone():
    counts = [plan(make_scores(np.eye(4)), drop=drop).n_dropped for drop in (0.0, 0.25, 0.5)]
    assert counts[0] == 0
    assert all(less < more for less, more in pairwise(counts))


def test_scores_made_for_another_drop_are_refused():
    scores = make_scores([[3, 1, 2, 4]], settings={"drop": 0.25})
    assert plan(scores, drop=0.25).n_dropped == 1
    with pytest.raises(PlanError, match=r"hold for drop=0.25, not 0.5; score again"):
        plan(scores, drop=0.5)


def test_plan_without_top_k_is_refused():
    with pytest.raises(PlanError, match="at least one expert"):
        Plan(keep={0: ()}, n_experts=4, top_k=0, criterion="x", drop=0.5, per="layer")


def test_equalised_plans_keep_nothing_of_a_drop_list(tmp_path):
    scores = make_scores([[9, 1, 2, 3, 4, 5], [10, 20, 30, 40, 50, 60]])
    made = plan(scores, experts=8, per="model", drop_list={0: [0]}, out=tmp_path / "plan.json")
    assert made.keep == {0: (4, 5), 1: (0, 1, 2, 3, 4, 5)}
    assert made.equalised().keep == {0: (2, 3, 4, 5), 1: (2, 3, 4, 5)}
    assert load_plan(tmp_path / "plan.json") == made
    assert load_plan(tmp_path / "plan.json").equalised() == made.equalised()
    long = plan(scores, experts=9, per="model", drop_list={0: [0, 3, 4]})
    assert long.equalised().keep == {0: (1, 2, 5), 1: (3, 4, 5)}
    bad = json.loads((tmp_path / "plan.json").read_text()) | {"drop_list": {"1": [5]}}
    with pytest.raises(PlanError, match="layer 1 keeps an expert of its drop-list"):
        plan_from_json(bad, "plan.json")
