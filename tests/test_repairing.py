"""Router repair: a student on the whole model's weights, never worse, judged on other text."""

import copy
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import models
from moecollab.errors import DataError, PlanError, SettingsError
from moecollab.evaluation.perplexity import Window
from moecollab.evaluation.repairing.distilling import Course, Pair, distil
from moecollab.evaluation.repairing.repairing import _parts, repair
from moecollab.evaluation.repairing.trainable import Trainable
from moecollab.models.keep import Keep
from moecollab.models.masked import Mask
from moecollab.models.routing import find_moe_layers
from moecollab.pruning.merging.merging import merge
from moecollab.pruning.plans import Plan
from moecollab.pruning.pruning import prune
from moecollab.record.corpus import read_corpus

pytestmark = pytest.mark.filterwarnings("ignore")
KEPT = (0, 2, 3, 5, 6)


def keep_of(model, kept=KEPT):
    layers = find_moe_layers(model)
    return Keep({layer.layer: kept for layer in layers}, layers[0].n_experts, layers[0].top_k)


def plan_of(model, kept=KEPT):
    keep = keep_of(model, kept)
    names = {"criterion": "frequency", "drop": 0.25, "per": "layer"}
    return Plan(keep=keep.keep, n_experts=keep.n_experts, top_k=keep.top_k, **names)


def windows(n=6, size=12):
    draw = np.random.default_rng(0)
    return [
        Window(i, tuple(draw.integers(3, models.VOCABULARY, size - i).tolist())) for i in range(n)
    ]


def corpus(n=20):
    draw = np.random.default_rng(1)
    letters = np.array(list("abcdefghij "))
    return ["".join(draw.choice(letters, 30)) + "." for _ in range(n)]


def test_divergence_by_its_definition():
    """One window at a time, from the logits of a masked model and of the whole one."""
    model = models.build("qwen2_moe")
    pair = Pair(Trainable(model, keep_of(model)), model)
    found = pair.measure(windows(3), batch_size=3)
    for window, value in zip(windows(3), found, strict=True):
        ids = torch.tensor([window.ids])
        with torch.no_grad():
            whole = model(input_ids=ids).logits.double().log_softmax(-1)
            with Mask(model, keep_of(model)):
                small = model(input_ids=ids).logits.double().log_softmax(-1)
        assert value == pytest.approx(float((whole.exp() * (whole - small)).sum()), rel=1e-4)


def test_nothing_but_routers_and_norms_changes_and_the_model_is_whole_after(family):
    model = models.build(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student = Trainable(model, keep_of(model))
    assert distil(Pair(student, model), windows(), windows(), Course(4, None, 1e-3, 6, 0)) > 0
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    prune(model, keep_of(model))
    cut = {name: value.clone() for name, value in model.state_dict().items()}
    student.write()
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, cut[name])
    }
    assert changed
    assert all("norm" in name or "gate.weight" in name for name in changed)
    assert any("gate.weight" in name for name in changed)


def test_training_lowers_the_divergence_and_the_best_state_is_kept():
    model = models.build("olmoe")
    pair = Pair(Trainable(model, keep_of(model)), model)
    start = pair.measure(windows(), 6).sum()
    distil(pair, windows(), windows(), Course(40, None, 1e-2, 6, 0))
    assert pair.measure(windows(), 6).sum() < 0.9 * start


def test_a_rate_that_ruins_the_student_leaves_it_as_it_was():
    model = models.build("olmoe")
    pair = Pair(Trainable(model, keep_of(model)), model)
    before = pair.student.state()
    distil(pair, windows(), windows(2), Course(10, None, 30.0, 2, 0))
    held = pair.student.state()
    assert all(torch.equal(one, other) for one, other in zip(held, before, strict=True))


def test_student_of_a_pruned_model_equals_student_under_a_mask():
    whole = models.build("mixtral")
    small = prune(copy.deepcopy(whole), keep_of(whole))
    masked = Trainable(copy.deepcopy(whole), keep_of(whole))
    pairs = [Pair(masked, masked.model), Pair(Trainable(small, None), whole)]
    for pair in pairs:
        distil(pair, windows(), windows(2), Course(3, None, 1e-3, 2, 0))
    for one, other in zip(pairs[0].student.copies, pairs[1].student.copies, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_checkpoint_is_the_repaired_model_and_repeats_exactly(tmp_path, token_ids, logits):
    base = models.save("qwen3_moe", tmp_path / "base")
    plan = plan_of(models.build("qwen3_moe"))
    settings = {"plan": plan, "steps": 6, "rate": 1e-2, "batch_size": 4}
    found = repair(base, corpus(), out=tmp_path / "small", **settings)
    again = repair(base, corpus(), **settings)
    assert (found.before, found.after, found.steps) == (again.before, again.after, again.steps)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(logits(stock, token_ids), logits(found.model, token_ids))
    assert find_moe_layers(stock)[0].n_experts == len(KEPT)
    note = json.loads((tmp_path / "small" / "moecollab.json").read_text())
    assert note["experts"]["keep"]["1"] == list(KEPT)
    assert note["repaired"]["gain"] == pytest.approx(found.before - found.after)
    assert "gain" in repr(found)


def pruned_folder(base, out):
    prune(base, plan_of(models.build("qwen3_moe")), out=out)


def merged_folder(base, out):
    plan = plan_of(models.build("qwen3_moe"))
    merge(base, plan, how="ream", corpus=[np.arange(3, 60)], out=out)


def kl_of(whole, small, documents, tokenizer):
    """KL(whole ‖ small) in nats per token, document by document."""
    total, n = 0.0, 0
    for text in documents:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            first, second = (
                one(input_ids=ids).logits.double().log_softmax(-1) for one in (whole, small)
            )
        total += float((first.exp() * (first - second)).sum())
        n += ids.shape[1]
    return total / n


@pytest.mark.parametrize("make", [pruned_folder, merged_folder])
def test_two_folders_through_the_command(make, tmp_path):
    """The teacher whole, the student pruned or merged: both on disk, and both left as they are."""
    base = models.save("qwen3_moe", tmp_path / "base")
    small, out = tmp_path / "small", tmp_path / "repaired"
    make(base, small)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": one}) + "\n" for one in corpus()))
    before = {path: path.read_bytes() for one in (base, small) for path in one.iterdir()}
    more = ["--steps", "12", "--rate", "0.002", "--batch-size", "4", "--out", out]
    arguments = ["repair", small, text, "--teacher", base, *more]
    run = subprocess.run(
        [sys.executable, "-m", "moecollab", *map(str, arguments)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.startswith(f"{out}: Repair(KL from the whole model")
    assert all(path.read_bytes() == held for path, held in before.items())
    note, first = (json.loads((one / "moecollab.json").read_text()) for one in (out, small))
    told = note.pop("repaired")
    assert note == first
    assert told["steps"] > 0
    assert told["after"] <= told["before"]
    tensors = [load_file(one / "model.safetensors") for one in (small, out)]
    changed = {
        name for name, value in tensors[0].items() if not torch.equal(tensors[1][name], value)
    }
    assert changed
    assert all("norm" in name or "gate.weight" in name for name in changed)
    whole, student, repaired = (
        AutoModelForCausalLM.from_pretrained(one).eval() for one in (base, small, out)
    )
    judged = [one.text for one in _parts(read_corpus(text), 0)[2].documents]
    for model, value in ((student, told["before"]), (repaired, told["after"])):
        found = kl_of(whole, model, judged, models.build_tokenizer())
        assert found == pytest.approx(value, rel=1e-3)


def test_no_steps_are_plain_pruning(tmp_path, token_ids, logits):
    base = models.save("olmoe", tmp_path / "base")
    plan = plan_of(models.build("olmoe"))
    found = repair(base, corpus(), plan=plan, steps=0)
    assert found.gain == 0
    assert torch.equal(logits(found.model, token_ids), logits(prune(base, plan), token_ids))


def test_parts_share_no_document_and_hold_out_a_fifth():
    texts = [{"text": f"{i}", "domain": "ab"[i % 2]} for i in range(40)]
    parts = _parts(read_corpus(texts), 0)
    assert [len(part) for part in parts] == [32, 4, 4]
    assert len({one.text for part in parts for one in part.documents}) == 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "plan and teacher is 'neither'"),
        ({"plan": 1, "teacher": 1}, "plan and teacher is 'both'"),
        ({"teacher": "x", "steps": -1}, "steps is -1"),
        ({"teacher": "x", "rate": 0.0}, "rate is 0.0"),
        ({"teacher": "x", "minutes": math.nan}, "minutes is nan"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SettingsError, match=message):
        repair(models.build("mixtral"), corpus(), **settings)


def test_too_little_text_and_plans_that_do_not_fit(tmp_path):
    base = models.save("mixtral", tmp_path / "base")
    plan = plan_of(models.build("mixtral"))
    with pytest.raises(DataError, match="give ten or more"):
        repair(base, ["one", "two"], plan=plan)
    with pytest.raises(PlanError, match="make the plan from activations of this model"):
        repair(base, corpus(), plan=plan_of(models.build("qwen3_moe")))
