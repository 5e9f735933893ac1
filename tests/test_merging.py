"""Groups of experts become one each: who, how, and a checkpoint that is smaller and loads."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import models
import zoo
from moecollab.errors import MissingInputError, PlanError, SettingsError, UnsupportedModelError
from moecollab.models.keep import Keep
from moecollab.models.masked import Mask
from moecollab.models.routing import find_moe_layers
from moecollab.models.slicing import router_rows
from moecollab.models.stacks import expert_stacks, replace_stacks
from moecollab.pruning.merging.groups import alignments, around, clusters, in_turn
from moecollab.pruning.merging.merging import merge
from moecollab.pruning.merging.neurons import Neurons, Place, find_neurons
from moecollab.pruning.merging.seen import observe
from moecollab.pruning.pruning import prune
from moecollab.record.extraction import extract

FAMILIES = ("mixtral", "gpt_oss", "dbrx", "llama4_text/top-2", "deepseek_v3", "longcat_flash")
"""Tried every day: plain, interleaved, flat, transposed, with groups, with identity experts."""

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = ("hc_smoe", "m_smoe", "dek", "ream")


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all-families")
        metafunc.parametrize("name", zoo.ZOO if every else FAMILIES)


@pytest.fixture
def model(name):
    reason = zoo.missing(name)
    if reason:
        pytest.skip(reason)
    # Four groups of two experts could not lose any: a group is scored by two.
    fewer = {"n_group": 2, "topk_group": 1} if zoo.ZOO[name].get("n_group") == 4 else {}
    built = zoo.build(name, **fewer)
    layout = find_moe_layers(built)[0].layout
    if layout.fixed or layout.uncut:
        pytest.skip(layout.fixed or layout.uncut)
    return built


def windows(n=2, size=20, vocabulary=zoo.VOCABULARY):
    rng = np.random.default_rng(0)
    return [rng.integers(3, vocabulary, size) for _ in range(n)]


def keeping(model, kept):
    layers = find_moe_layers(model)
    return Keep({layer.layer: kept for layer in layers}, layers[0].n_experts, layers[0].top_k)


def in_pairs(model):
    """Experts 0 and 1 as one, 4 and 5 as one: as many of each router group are left."""
    groups = [[0, 1], [2], [3], [4, 5], [6], [7]]
    return {layer.layer: groups for layer in find_moe_layers(model)}


def put(tensor, values):
    with torch.no_grad():
        tensor.copy_(values)


def make_twins(model, order=None):
    """Makes experts 1 and 5 copies of 0 and 4 with equal router rows; perhaps reordered."""
    for layer in find_moe_layers(model):
        stacks = {name: value.clone() for name, value in expert_stacks(layer).items()}
        for name, value in stacks.items():
            for first, twin in ((0, 1), (4, 5)):
                same = value[first]
                value[twin] = same if order is None else order.ordered(name, same, _turned(order))
        replace_stacks(layer, stacks)
        for _, _, value in router_rows(layer):
            rows = value.detach().T if value.shape[0] == 1 and value.dim() == 2 else value.detach()
            rows[1], rows[5] = rows[0].clone(), rows[4].clone()


def _turned(neurons):
    return torch.arange(neurons.size).roll(3)


def neurons_of(model):
    layer = find_moe_layers(model)[0]
    (seen,) = observe(model, [layer], windows(1), router=False)
    return find_neurons(layer, lambda: seen.everyone.outputs_of(seen.sample[:8]))


def dropped_twins(model):
    return keeping(model, (0, 2, 3, 4, 6, 7))


def test_twins_merge_to_what_dropping_one_of_them_leaves(name, model):
    """The closed form: of equal experts with equal rows, one is lost and nothing else."""
    make_twins(model)
    expected = copy.deepcopy(model)
    prune(expected, dropped_twins(model))
    with Mask(model, dropped_twins(model)):
        masked = zoo.output_of(model, zoo.batch())
    for router in ("dominant", "mean"):
        made = merge(copy.deepcopy(model), in_pairs(model), how="dek", router=router)
        for layer, other in zip(find_moe_layers(made), find_moe_layers(expected), strict=True):
            assert layer.n_experts == 6
            for path, value in expert_stacks(layer).items():
                assert torch.equal(value, expert_stacks(other)[path])
        torch.testing.assert_close(zoo.output_of(made, zoo.batch()), masked, rtol=0, atol=1e-5)


def test_reordered_twins_merge_back_to_themselves(name, model):
    make_twins(model, neurons_of(model))
    expected = zoo.output_of(prune(copy.deepcopy(model), dropped_twins(model)), zoo.batch())
    for how in ("dek", "ream"):
        aligned = merge(
            copy.deepcopy(model), in_pairs(model), how=how, corpus=windows(), align=True
        )
        got = zoo.output_of(aligned, zoo.batch())
        if how == "dek" or not any(layer.layout.scoring for layer in find_moe_layers(model)):
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    apart = merge(copy.deepcopy(model), in_pairs(model), how="dek")
    assert not torch.allclose(zoo.output_of(apart, zoo.batch()), expected, atol=1e-4)


def test_plain_average_is_that_of_the_tensors(name, model):
    whole = copy.deepcopy(model)
    made = merge(model, in_pairs(model), how="dek")
    for layer, before in zip(find_moe_layers(made), find_moe_layers(whole), strict=True):
        stacks = expert_stacks(before)
        for path, value in expert_stacks(layer).items():
            old = stacks[path]
            torch.testing.assert_close(value[0], (old[0] + old[1]) / 2)
            assert torch.equal(value[1:3], old[2:4])
            assert torch.equal(value[4:], old[6:])
        for (_, _, row), (_, _, old) in zip(router_rows(layer), router_rows(before), strict=True):
            turned = row.dim() == 2 and row.shape[0] == 1
            flat, was = (one.detach().T if turned else one.detach() for one in (row, old))
            torch.testing.assert_close(flat[0], (was[0] + was[1]) / 2)


@pytest.mark.parametrize("how", METHODS)
def test_smaller_checkpoint_loads_in_stock_transformers(how, tmp_path, token_ids, logits):
    base = models.save("qwen2_moe", tmp_path / "base")
    whole = models.build("qwen2_moe")
    text = windows(vocabulary=models.VOCABULARY)
    made = merge(base, keeping(whole, (0, 2, 5)), how=how, corpus=text, out=tmp_path / "small")
    prune(base, keeping(whole, (0, 2, 5)), out=tmp_path / "cut")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(logits(again, token_ids), logits(made, token_ids))
    size = {one: (tmp_path / one / "model.safetensors").stat().st_size for one in ("small", "cut")}
    assert size["small"] == size["cut"] < (base / "model.safetensors").stat().st_size
    note = json.loads((tmp_path / "small" / "moecollab.json").read_text())
    assert note["kind"] == "pruned model"
    assert note["merged"]["how"] == how
    for layer in find_moe_layers(whole):
        groups = note["merged"]["groups"][str(layer.layer)]
        assert sorted(one for group in groups for one in group) == list(range(8))
        assert [group[0] for group in groups] == note["experts"]["keep"][str(layer.layer)]
        if how in ("m_smoe", "ream"):
            assert [group[0] for group in groups] == [0, 2, 5]


def test_groups_of_one_are_the_identity(token_ids, logits):
    model = models.build("olmoe")
    before = logits(model, token_ids)
    for how in METHODS:
        text = windows(vocabulary=models.VOCABULARY)
        merge(model, keeping(model, tuple(range(8))), how=how, corpus=text)
        assert torch.equal(logits(model, token_ids), before)


def test_router_groups_keep_as_many_experts(token_ids, logits):
    model = models.build("deepseek_v3", n_group=2, topk_group=1)
    text = windows(vocabulary=models.VOCABULARY)
    merge(model, keeping(model, (0, 1, 6, 7)), how="hc_smoe", corpus=text)
    assert {layer.n_experts for layer in find_moe_layers(model)} == {4}
    assert logits(model, token_ids).isfinite().all()


def test_recording_and_text_differ_only_by_whose_tokens_are_averaged(tmp_path, texts):
    """With all experts on every token both are the same mean."""
    base = models.save("mixtral", tmp_path / "base", num_experts_per_tok=8)
    model = models.build("mixtral", num_experts_per_tok=8)
    acts = extract(base, texts, out=tmp_path / "acts", collect="channels")
    keep = keeping(model, tuple(range(8)))
    assert merge(base, keep, activations=acts) is not None
    (seen, *_) = observe(model, find_moe_layers(model), _windows_of(texts), router=False)
    sums = acts.tallies().total()
    np.testing.assert_allclose(
        seen.means, sums["sum_output"][0] / sums.count[0][:, None], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(seen.means, seen.routed_means, rtol=1e-9)
    assert (seen.counts == sums.count[0]).all()


def _windows_of(texts):
    tokenizer = models.build_tokenizer()
    ids = [np.array(tokenizer(one["text"])["input_ids"], np.int64) for one in texts]
    return [one[start : start + 64] for one in ids for start in range(0, len(one), 64)]


def test_novices_give_their_mean_output_and_the_rest_stays():
    model = zoo.build("gpt_oss")
    whole = copy.deepcopy(model)
    text = windows()
    merge(model, keeping(model, (0, 2, 3, 5, 6)), how="mone", corpus=text)
    (before, *_) = observe(whole, find_moe_layers(whole), text, router=False)
    after = observe(model, find_moe_layers(model)[:1], text, router=False)
    outputs = next(iter(after)).everyone.outputs_of(torch.randn(4, 32))
    wanted = torch.tensor(before.routed_means)[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(outputs[[1, 4, 7]], wanted[[1, 4, 7]], rtol=1e-5, atol=1e-6)
    for path, value in expert_stacks(find_moe_layers(model)[0]).items():
        old = expert_stacks(find_moe_layers(whole)[0])[path]
        assert torch.equal(value[[0, 2, 3, 5, 6]], old[[0, 2, 3, 5, 6]])


FRESH = """
import sys
sys.modules["moecollab"] = None  # an import of it is an error
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False).eval()
with torch.inference_mode():
    found = model(input_ids=torch.load(sys.argv[2], weights_only=True)).logits
torch.save(found, sys.argv[3])
"""


def test_a_folder_with_novices_is_a_stock_model(tmp_path):
    """In a fresh process without us, it computes what the model in memory does."""
    base, out = tmp_path / "base", tmp_path / "novices"
    zoo.build("gpt_oss").save_pretrained(base)
    keep = keeping(zoo.build("gpt_oss"), (0, 2, 3, 5, 6))
    merged = merge(base, keep, how="mone", corpus=windows(), out=out)
    ids = zoo.batch()["input_ids"]
    torch.save(ids, tmp_path / "ids.pt")
    files = [str(one) for one in (out, tmp_path / "ids.pt", tmp_path / "logits.pt")]
    run = subprocess.run([sys.executable, "-c", FRESH, *files], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(found, zoo.output_of(merged, {"input_ids": ids}))
    whole = AutoModelForCausalLM.from_pretrained(base).eval()
    assert not torch.allclose(found, zoo.output_of(whole, {"input_ids": ids}), atol=1e-3)
    note = json.loads((out / "moecollab.json").read_text())
    assert note["kind"] == "model with novices"
    assert note["loads"].startswith("loads in transformers")
    n_constant = 3 * len(find_moe_layers(whole))
    assert (
        f"{n_constant} of {8 * n_constant // 3} experts constant" in (out / "README.md").read_text()
    )


def test_novices_elsewhere_are_refused():
    model = models.build("mixtral")
    with pytest.raises(UnsupportedModelError, match="mixtral have no bias after their last"):
        merge(model, keeping(model, (0, 1)), how="mone", corpus=windows())


def test_failure_changes_nothing(monkeypatch, token_ids, logits):
    from moecollab.pruning.merging import merging

    model = models.build("olmoe")
    before, calls = logits(model, token_ids), []

    def fails_at_the_second(layer, stacks):
        calls.append(layer)
        if len(calls) == 2:
            raise MemoryError
        return replace_stacks(layer, stacks)

    monkeypatch.setattr(merging, "replace_stacks", fails_at_the_second)
    with pytest.raises(MemoryError):
        merge(model, in_pairs(model), how="dek", router="mean")
    assert torch.equal(logits(model, token_ids), before)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"how": "hc_smo"}, SettingsError, "did you mean hc_smoe"),
        ({"router": "median"}, SettingsError, "one of dominant, mean"),
        ({"how": "mone", "align": True}, SettingsError, "left out under mone"),
        ({"how": "m_smoe"}, MissingInputError, r"pass corpus= \(--corpus\)"),
        ({}, MissingInputError, "recorded with collect='channels'"),
    ],
)
def test_wrong_settings(settings, error, message):
    model = models.build("mixtral")
    with pytest.raises(error, match=message):
        merge(model, keeping(model, (0, 1, 2)), **settings)


def test_groups_that_are_no_partition():
    model = models.build("mixtral")
    groups = in_pairs(model) | {1: [[0, 1], [1, 2], [3, 4, 5, 6, 7]]}
    with pytest.raises(PlanError, match="groups of layer 1 name experts"):
        merge(model, groups, how="dek")


def test_clusters_are_as_many_as_asked_under_ties():
    same = np.zeros((4, 4))
    assert [len(clusters(same, n)) for n in (1, 2, 3, 4)] == [1, 2, 3, 4]


def test_average_linkage_by_hand():
    """0 and 1 merge first; then 2 is 4.5 from their pair on average, but 4 from 3."""
    points = np.array([0.0, 1.0, 5.0, 9.0])
    apart = np.abs(np.subtract.outer(points, points))
    assert clusters(apart, 2) == [[0, 1], [2, 3]]
    assert clusters(apart, 3) == [[0, 1], [2], [3]]


def test_each_centre_takes_its_nearest_and_the_rest_join_theirs():
    alike = np.eye(5)
    alike[0, [2, 3, 4]] = alike[[2, 3, 4], 0] = 0.9, 0.8, 0.1
    alike[1, [2, 3, 4]] = alike[[2, 3, 4], 1] = 0.5, 0.6, 0.7
    assert in_turn(alike, [0, 1], most=1) == [[0, 2, 3], [1, 4]]
    assert in_turn(alike, [1, 0], most=3) == [[1, 4, 3, 2], [0]]
    assert around(alike, [0, 1]) == [[0, 2, 3], [1, 4]]


def test_cka_is_one_for_scaled_and_shifted_copies_and_matches_its_definition():
    rng = np.random.default_rng(0)
    first, other = rng.normal(size=(2, 30, 5))
    found = alignments(np.stack([first, 3 * first + 2, other]))
    one, two = first - first.mean(axis=0), other - other.mean(axis=0)
    top = np.linalg.norm(one.T @ two) ** 2
    direct = top / np.linalg.norm(one.T @ one) / np.linalg.norm(two.T @ two)
    np.testing.assert_allclose(found[0], [1, 1, direct], rtol=1e-12)


def test_neurons_of_interleaved_and_of_concatenated_projections():
    assert neurons_of(zoo.build("gpt_oss")).places["gate_up_proj"] == Place(1, "pairs")
    assert neurons_of(zoo.build("mixtral")).places["gate_up_proj"] == Place(0, "halves")
    assert neurons_of(zoo.build("gpt_oss")).places["down_proj_bias"] is None


def test_rows_of_neurons_follow_their_order():
    draw = torch.arange(24.0).reshape(6, 4)
    for place in (Place(0, "halves"), Place(0, "pairs")):
        neurons = Neurons(3, {"w": place})
        order = torch.tensor([2, 0, 1])
        turned = neurons.ordered("w", draw, order)
        assert torch.equal(neurons.rows("w", turned), neurons.rows("w", draw)[order])
