"""A smaller checkpoint: loads in stock transformers and computes the same."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from moecollab.errors import DataError, OutputExistsError, PlanError, UnsupportedModelError
from moecollab.models.keep import Keep
from moecollab.models.masking import mask
from moecollab.models.routing import find_moe_layers
from moecollab.pruning import pruning
from moecollab.pruning.plans import Plan
from moecollab.pruning.pruning import prune
from moecollab.record.extraction import extract


def plan_for(model, *kept, scores=None):
    layers = find_moe_layers(model)
    chosen = {layer.layer: kept[i % len(kept)] for i, layer in enumerate(layers)}
    return Plan(
        keep=chosen,
        n_experts=layers[0].n_experts,
        top_k=layers[0].top_k,
        criterion="frequency",
        drop=0.25,
        per="layer",
        scores=scores,
    )


def test_reload_in_stock_transformers(family, tmp_path, token_ids, logits):
    base = models.save(family, tmp_path / "base")
    plan = plan_for(models.build(family), (0, 2, 3, 5, 6, 7))
    expected = logits(prune(base, plan), token_ids)
    assert prune(base, plan, out=tmp_path / "small") == tmp_path / "small"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits(model.eval(), token_ids), expected, rtol=0, atol=1e-5)
    layers = find_moe_layers(model)
    assert {layer.n_experts for layer in layers} == {6}
    words = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert words("a writ")["input_ids"] == models.build_tokenizer()("a writ")["input_ids"]
    note = json.loads((tmp_path / "small" / "moecollab.json").read_text())
    assert note["kind"] == "pruned model"
    assert note["experts"]["keep"][str(layers[0].layer)] == [0, 2, 3, 5, 6, 7]


def test_kept_experts_are_the_same_in_the_same_order(family):
    model, whole = models.build(family), models.build(family)
    kept = (1, 4, 6)
    prune(model, plan_for(whole, kept))
    for cut, full in zip(find_moe_layers(model), find_moe_layers(whole), strict=True):
        for name in ("gate_up_proj", "down_proj"):
            before, after = getattr(full.experts, name), getattr(cut.experts, name)
            assert torch.equal(after, before[list(kept)])
            assert isinstance(after, torch.nn.Parameter)
        assert torch.equal(cut.router.weight, full.router.weight[list(kept)])
        bias = getattr(cut.router, "e_score_correction_bias", None)
        if bias is not None:
            assert torch.equal(bias, full.router.e_score_correction_bias[list(kept)])
        assert cut.router.num_experts == cut.experts.num_experts == 3


def test_dropping_nothing_is_the_identity(family, tmp_path, token_ids, logits):
    base = models.save(family, tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(base).eval()
    pruned = prune(base, plan_for(whole, tuple(range(8))))
    assert torch.equal(logits(pruned, token_ids), logits(whole, token_ids))
    before, after = whole.state_dict(), pruned.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    prune(pruned, plan_for(whole, tuple(range(8))), out=tmp_path / "same")
    weights = "model.safetensors"
    assert (base / weights).read_bytes() == (tmp_path / "same" / weights).read_bytes()


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen3_moe", ("num_experts", "num_local_experts")),
        ("mixtral", ("num_experts", "num_local_experts")),
        ("qwen2_moe", ("num_experts",)),
        ("deepseek_v3", ("n_routed_experts", "num_local_experts")),
    ],
)
def test_count_stands_under_every_name(family, names, tmp_path):
    base = models.save(family, tmp_path / "base")
    prune(base, plan_for(models.build(family), (0, 1, 2, 3, 5)), out=tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert {name: config[name] for name in names} == dict.fromkeys(names, 5)


def test_plan_with_other_counts_says_what_to_do(tmp_path):
    model = models.build("mixtral")
    with pytest.raises(PlanError) as caught:
        prune(model, plan_for(model, (0, 1, 2), (0, 1)), out=tmp_path / "small")
    assert str(caught.value) == (
        "layer 1 keeps 2 experts and layer 0 keeps 3, but a checkpoint has one number for all "
        "layers; pass uneven='equalise', 'pad' or 'native' (--uneven), plan with per='layer' and "
        "an amount other than mass, or mask the model instead"
    )
    assert not (tmp_path / "small").exists()
    assert find_moe_layers(model)[0].n_experts == 8


def test_equalise(tmp_path):
    model = models.build("mixtral")
    scores = torch.arange(24, dtype=torch.float64).reshape(3, 8).numpy()
    plan = plan_for(model, (0, 1, 2, 3), (0, 1), (2, 3, 4), scores=scores)
    plan.save(tmp_path / "plan.json")
    pruned = prune(model, tmp_path / "plan.json", uneven="equalise")
    assert {layer.n_experts for layer in find_moe_layers(pruned)} == {3}


def test_groups_with_unequal_numbers():
    model = models.build("deepseek_v3", n_group=2, topk_group=1)
    with pytest.raises(PlanError, match=r"layer 1 keeps \[4, 2\] experts in its 2 router groups"):
        prune(model, plan_for(model, (0, 1, 2, 3, 4, 5)))
    assert find_moe_layers(model)[0].n_experts == 8


def test_plan_of_another_model():
    with pytest.raises(PlanError, match="make the plan from activations of this model"):
        prune(models.build("mixtral"), plan_for(models.build("qwen3_moe"), (0, 1, 2)))


def test_existing_output(tmp_path):
    model = models.build("mixtral")
    with pytest.raises(OutputExistsError):
        prune(model, plan_for(model, (0, 1, 2)), out=tmp_path)
    assert find_moe_layers(model)[0].n_experts == 8


def test_failed_cut_changes_nothing(token_ids, logits, monkeypatch):
    model = models.build("mixtral")
    before = logits(model, token_ids)
    cut, calls = pruning.slice_experts, []

    def fails_at_the_second(layer, kept):
        calls.append(layer)
        if len(calls) == 2:
            raise MemoryError
        return cut(layer, kept)

    monkeypatch.setattr(pruning, "slice_experts", fails_at_the_second)
    with pytest.raises(MemoryError):
        prune(model, plan_for(model, (0, 1, 2)))
    assert torch.equal(logits(model, token_ids), before)


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    model = models.build("mixtral")

    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr(pruning, "_write_aliases", fails)
    with pytest.raises(OSError, match="disk full"):
        prune(model, plan_for(model, (0, 1, 2)), out=tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_pruned_model_can_be_recorded_and_pruned_again(tmp_path, texts):
    base = models.save("olmoe", tmp_path / "base")
    prune(base, plan_for(models.build("olmoe"), (0, 1, 2, 5, 7)), out=tmp_path / "small")
    acts = extract(tmp_path / "small", texts, out=tmp_path / "acts")
    assert (acts.n_experts, acts.top_k) == (5, 2)
    again = Keep(dict.fromkeys(range(3), (0, 4)), 5, 2)
    smaller = prune(tmp_path / "small", again)
    assert find_moe_layers(smaller)[0].n_experts == 2


def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("No space left on device")

    model = models.build("qwen2_moe")
    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(DataError, match="could not be written"):
        prune(model, plan_for(model, (0, 1, 2)), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_tied_experts_are_refused_and_left_alone(token_ids, logits):
    model = models.build("mixtral")
    first, second, _ = find_moe_layers(model)
    second.experts.down_proj = first.experts.down_proj
    before = logits(model, token_ids)
    with pytest.raises(UnsupportedModelError, match="layer 0 cannot be cut, as model"):
        prune(model, plan_for(model, (0, 1, 2)))
    second.block.experts = first.experts  # the module itself
    with pytest.raises(UnsupportedModelError, match="give each its own copy, or mask the model"):
        prune(model, plan_for(model, (0, 1, 2)))
    second.block.experts = second.experts
    assert torch.equal(logits(model, token_ids), before)


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    saved = torch.load(f"{folder}/../expected.pt", weights_only=True)
    with torch.inference_mode():
        logits = model(input_ids=saved["ids"]).logits
        torch.testing.assert_close(logits, saved["logits"], rtol=0, atol=1e-5)
        told = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        with_cache, without = (
            model.generate(saved["ids"][:, :5], use_cache=cache, **told) for cache in (True, False)
        )
    assert torch.equal(with_cache, without), folder
    assert with_cache.shape[1] == 13
assert "moecollab" not in sys.modules
"""


def test_a_fresh_process_without_us_computes_what_the_mask_did(tmp_path, token_ids, logits):
    folders = []
    for name in models.FAMILIES:
        base, keep = models.save(name, tmp_path / name / "base"), (0, 2, 3, 6)
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        plan = plan_for(model, keep)
        with mask(model, plan):
            expected = {"ids": token_ids, "logits": logits(model, token_ids)}
        torch.save(expected, tmp_path / name / "expected.pt")
        prune(base, plan, out=tmp_path / name / "small")
        folders.append(str(tmp_path / name / "small"))
    found = subprocess.run([sys.executable, "-c", FRESH, *folders], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]


def test_only_routed_experts_and_their_router_rows_change(family):
    model, whole = models.build(family), models.build(family)
    prune(model, plan_for(whole, (1, 4, 6)))
    before, after = whole.state_dict(), model.state_dict()
    cut = {name for name in before if ".experts." in name or ".gate." in name}
    assert cut, "nothing to cut"
    for name, value in before.items():
        same = value.shape == after[name].shape
        assert same != (name in cut), name
        assert not same or torch.equal(value, after[name]), name


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    model = models.build("mixtral")
    with torch.no_grad():
        find_moe_layers(model)[1].experts.down_proj[3, 0, 0] = float("nan")
    with pytest.raises(DataError, match=r"layers\.1\..*holds NaN or infinite values"):
        prune(model, plan_for(model, (0, 1, 2)))
