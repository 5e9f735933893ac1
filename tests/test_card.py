"""The README of a pruned checkpoint, field by field."""

import json

import pytest
import torch

import models
from moecollab import evaluate
from moecollab.errors import DataError, SchemaError
from moecollab.models.keep import Keep
from moecollab.models.loading import digest_base, digest_tensors, load_model
from moecollab.models.masking import amplify, mask
from moecollab.models.routing import find_moe_layers
from moecollab.models.streamed import StreamedModel
from moecollab.pruning.plans import Plan
from moecollab.pruning.pruning import prune

BASE = """---
library_name: transformers
license: other
license_name: someone's
license_link: https://example.org/licence
language:
- en
- de
datasets:
- secret
---

# The base

It is good.
"""


@pytest.fixture
def base(tmp_path):
    """A model's folder with a card and a licence."""
    folder = models.save("qwen3_moe", tmp_path / "Some-MoE")
    (folder / "README.md").write_text(BASE)
    (folder / "LICENSE.txt").write_text("You may.")
    return folder


def plan_of(*, scores=None, **more):
    layers = find_moe_layers(models.build("qwen3_moe"))
    keep = dict(zip((one.layer for one in layers), ((0, 2, 5, 7), (1, 3, 6, 7)), strict=True))
    settings = {"criterion": "reap", "drop": 0.5, "per": "layer"} | more
    return Plan(keep=keep, n_experts=8, top_k=2, scores=scores, **settings)


def read(folder):
    text = (folder / "README.md").read_text()
    front, _, body = text.removeprefix("---\n").partition("---\n")
    return front.splitlines(), body


def evaluation(folder, **more):
    """An evaluation of a model, as its file has it."""
    model = load_model(folder)[0]
    inputs = {"base": digest_base(model, digest_tensors(model))}
    return {"kind": "evaluation", "format": 1, "inputs": inputs} | more


def rows(body, start):
    """Cells of the table whose first line begins so."""
    lines = body[body.index(start) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def size_of(folder):
    """Numbers and bytes in safetensors, read by their own library."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors").values()
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)


def test_every_field(base, tmp_path):
    plan = plan_of(protected={1: (0,)}, activations="abc123", sureness=0.9)
    prune(base, plan, out=tmp_path / "small")
    front, body = read(tmp_path / "small")
    assert front == [
        *("license: other", "license_name: someone's"),
        *("license_link: https://example.org/licence", "language:", "- en", "- de"),
        'base_model: "Some-MoE"',
        "tags: [mixture-of-experts, pruned, moecollab]",
    ]
    assert body.startswith("\n# Some-MoE with 4 of 8 experts a layer\n")
    (old, old_bytes), (new, new_bytes) = size_of(base), size_of(tmp_path / "small")
    assert new < old
    assert rows(body, "| | before") == [
        ["MoE layers", "2", "2"],
        ["routed experts", "16", "8"],
        ["experts a layer", "8", "4"],
        ["experts a token", "2", "2"],
        ["numbers stored", f"{old:,}", f"{new:,}"],
        ["bytes of weights", f"{old_bytes:,}", f"{new_bytes:,}"],
    ]
    assert "- **Criterion**: reap.\n- **Budget**: drop 0.5, per layer.\n" in body
    assert "- **Protected**: 1 experts that had to stay.\n" in body
    assert "- **Sureness**: those kept stay in 90.0% of draws.\n" in body
    assert "- **Calibration**: recording with digest abc123.\n" in body
    assert rows(body, "| layer |") == [["1", "8", "4", "0"], ["2", "8", "4", "0"]]
    assert "Not measured yet." in body
    assert "loads in transformers and in engines that read one expert count." in body
    assert 'AutoModelForCausalLM.from_pretrained("FOLDER")' in body
    assert str(tmp_path) not in body, "no path of this machine"
    assert (tmp_path / "small" / "BASE_README.md").read_text() == BASE
    assert (tmp_path / "small" / "LICENSE.txt").read_text() == "You may."


def test_card_of_native_layers(base, tmp_path):
    keep = Keep({1: (0, 2, 5, 7), 2: (1, 3, 6)}, 8, 2)
    prune(base, keep, uneven="native", out=tmp_path / "small")
    _, body = read(tmp_path / "small")
    assert "with 3 to 4 of 8 experts a layer" in body
    assert rows(body, "| layer |") == [["1", "8", "4", "0"], ["2", "8", "3", "0"]]
    assert "- **Criterion**: not known: the kept experts were given." in body
    assert "loads with moecollab.load_model only; others stop" in body
    assert "vllm" not in body


def test_card_of_padded_layers(tmp_path):
    base = models.save("deepseek_v3", tmp_path / "base")
    prune(base, Keep({1: (0, 2, 5, 7), 2: (1, 6)}, 8, 2), uneven="pad", out=tmp_path / "small")
    front, body = read(tmp_path / "small")
    assert front[0] == "# license: that of the base model; state it here"
    assert rows(body, "| layer |") == [["1", "8", "4", "0"], ["2", "8", "2", "2"]]
    assert not (tmp_path / "small" / "BASE_README.md").exists()


def test_costs(base, tmp_path, texts):
    full = evaluate(base, corpus=texts, name="full")
    full.save(tmp_path / "full.json")
    tried = evaluate(base, corpus=texts, name="masked")
    prune(base, plan_of(), out=tmp_path / "small", evaluations=[tmp_path / "full.json", tried])
    table = rows(read(tmp_path / "small")[1], "| model | measure")
    n_tokens = f"{full.documents['tokens'].sum():,} tokens"
    loss = ["loss, nats a token", f"{full.loss:.4f}", "", n_tokens]
    assert table == [["full", *loss], ["masked", *loss]]


def test_costs_of_tasks(base, tmp_path):
    task = {"task": "arc", "metric": "acc", "value": 0.512345, "stderr": None, "n": 1200}
    path = tmp_path / "found.json"
    path.write_text(json.dumps(evaluation(base, name="x", documents=None, tasks=[task])))
    prune(base, plan_of(), out=tmp_path / "small", evaluations=[path])
    table = rows(read(tmp_path / "small")[1], "| model | measure")
    assert table == [["x", "arc acc", "0.5123", "", "1,200 questions"]]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ({"kind": "plan", "format": 1}, SchemaError, "expected evaluation version 1"),
        ({"kind": "evaluation", "format": 1}, DataError, "is not whole"),
    ],
)
def test_evaluations_are_read_before_the_work(content, error, message, base, tmp_path):
    (tmp_path / "found.json").write_text(json.dumps(content))
    model = models.build("qwen3_moe")
    with pytest.raises(error, match=message):
        prune(model, plan_of(), out=tmp_path / "small", evaluations=[tmp_path / "found.json"])
    assert find_moe_layers(model)[0].n_experts == 8
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("text", ["", "# No front matter\n", "---\nlicense: mit\n", "---\n---\n"])
def test_cards_of_bases_that_say_nothing(text, base, tmp_path):
    (base / "README.md").write_text(text)
    prune(base, plan_of(), out=tmp_path / "small")
    front, _ = read(tmp_path / "small")
    assert front[0].startswith("# license: that of the base")
    assert (tmp_path / "small" / "BASE_README.md").read_text() == text


def test_a_model_from_nowhere_has_a_card(tmp_path):
    prune(models.build("qwen3_moe"), plan_of(), out=tmp_path / "small")
    assert 'base_model: "Qwen3MoeForCausalLM"' in read(tmp_path / "small")[0]


def test_evaluations_of_other_plans_are_refused(base, tmp_path, texts):
    other = Keep({1: (0, 1, 2, 3), 2: (0, 1, 2, 3)}, 8, 2)
    with mask(base, other) as tried:
        foreign = evaluate(tried, corpus=texts, tokenizer=models.build_tokenizer(), name="foreign")
    with mask(base, plan_of()) as tried:
        own = evaluate(tried, corpus=texts, tokenizer=models.build_tokenizer(), name="own")
    own.save(tmp_path / "own.json")
    with pytest.raises(DataError, match="evaluation 'foreign' is of another plan"):
        prune(base, plan_of(), out=tmp_path / "small", evaluations=[foreign])
    first = prune(base, plan_of(), out=tmp_path / "small", evaluations=[tmp_path / "own.json"])
    whole = evaluate(first, corpus=texts, name="whole")  # its plan is what is left in it
    again = Keep({1: (0, 1, 2), 2: (0, 1, 2)}, 4, 2)
    prune(first, again, out=tmp_path / "smaller", evaluations=[whole])
    assert rows(read(tmp_path / "smaller")[1], "| model | measure")[0][0] == "whole"


@pytest.mark.parametrize("given", ["folder", "loaded"])
def test_evaluations_of_other_models_are_refused(given, base, tmp_path, texts):
    other = models.save("qwen3_moe", tmp_path / "other", seed=1)
    (tmp_path / "renamed").symlink_to(base)  # the same weights at another place
    same = evaluate(tmp_path / "renamed", corpus=texts, name="same")
    whole = evaluate(other, corpus=texts, name="whole")
    with mask(other, plan_of()) as tried:
        masked = evaluate(tried, corpus=texts, tokenizer=models.build_tokenizer(), name="masked")
    model = base if given == "folder" else load_model(base)[0]
    for foreign in (whole, masked):
        message = f"evaluation '{foreign.name}' is of another model, .*other.* than the one"
        with pytest.raises(DataError, match=message):
            prune(model, plan_of(), out=tmp_path / "small", evaluations=[same, foreign])
    old = evaluation(base, name="old", documents=None, tasks=[]) | {"inputs": {}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    with pytest.raises(DataError, match=r"another model, not named \(weights not told\)"):
        prune(model, plan_of(), out=tmp_path / "small", evaluations=[tmp_path / "old.json"])
    assert not (tmp_path / "small").exists()
    prune(model, plan_of(), out=tmp_path / "small", evaluations=[same])
    assert rows(read(tmp_path / "small")[1], "| model | measure")[0][0] == "same"


def test_no_mask_changes_the_digest_of_the_base(family, tmp_path):
    folder = models.save(family, tmp_path / "base")
    model = load_model(folder)[0]
    before = digest_base(model, digest_tensors(model))
    layers = find_moe_layers(model)
    with mask(model, Keep({one.layer: (0, 2, 5, 7) for one in layers}, 8, 2)):
        assert digest_base(model, digest_tensors(model)) == before
    assert StreamedModel(folder, device="cpu").digest_base() == before
    with torch.no_grad():
        model.get_output_embeddings().weight[0] += 1
    assert digest_base(model, digest_tensors(model)) != before


def test_names_stay_in_their_cell(base, tmp_path):
    task = {"task": "arc", "metric": "acc", "value": 0.5, "stderr": None, "n": 12}
    found = evaluation(base, name="a | b\nc", documents=None, tasks=[task])
    (tmp_path / "found.json").write_text(json.dumps(found))
    prune(base, plan_of(), out=tmp_path / "small", evaluations=[tmp_path / "found.json"])
    body = read(tmp_path / "small")[1]
    assert "| a \\| b c | arc acc | 0.5 |  | 12 questions |" in body.splitlines()


def test_what_is_on_a_loaded_model_is_told_however_it_is_given(base, tmp_path):
    model, tokenizer = load_model(base)
    other = Keep({1: (0, 1, 2, 3), 2: (1, 3, 6, 7)}, 8, 2)
    settings = {"tokenizer": tokenizer, "corpus": ["a text of some length"] * 3}
    with mask(model, other) as masked:
        plain, given = (evaluate(one, **settings) for one in (model, masked))
    with amplify(model, {(1, 0): 5.0}) as louder:
        gained = evaluate(model, **settings)
        both = evaluate(mask(model, other), **settings)
        model_plans = [*both.plan["applied"]]
    assert plain.plan == given.plan == other.as_json()
    assert gained.plan == louder.as_json() == model_plans[0]
    for found in (plain, gained, both):
        with pytest.raises(DataError, match="of another plan than the one that is cut"):
            prune(base, plan_of(), out=tmp_path / "small", evaluations=[found])
    masked.remove()


def test_a_mask_that_was_removed_is_not_told(base):
    model, tokenizer = load_model(base)
    masked = mask(model, plan_of())
    masked.remove()
    assert evaluate(masked, tokenizer=tokenizer, corpus=["a text of some length"] * 3).plan is None
