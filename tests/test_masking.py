"""A masked model equals the pruned one, and a removed mask leaves no trace."""

import copy
import json

import pytest
import torch

import models
from moecollab.errors import (
    DataError,
    OutputExistsError,
    PlanError,
    SchemaError,
    UnsupportedModelError,
)
from moecollab.models.keep import Keep, check_keep, read_keep
from moecollab.models.loading import load_model
from moecollab.models.masking import mask
from moecollab.models.routing import find_moe_layers
from moecollab.models.slicing import slice_experts, slice_router
from moecollab.pruning.pruning import prune
from moecollab.record.extraction import extract
from moecollab.record.recorder import Recorder


def keeping(model, *kept):
    """A plan that keeps the same experts everywhere, or the n-th tuple in the n-th layer."""
    layers = find_moe_layers(model)
    chosen = {layer.layer: kept[i % len(kept)] for i, layer in enumerate(layers)}
    return Keep(chosen, layers[0].n_experts, layers[0].top_k)


def test_masked_equals_pruned(family, token_ids, logits):
    model = models.build(family)
    keep = keeping(model, (0, 2, 3, 5, 7))
    full = logits(model, token_ids)
    with mask(model, keep):
        masked = logits(model, token_ids)
    assert torch.equal(logits(prune(model, keep), token_ids), masked)
    assert not torch.equal(masked, full)


def test_masked_equals_pruned_with_other_counts_in_each_layer(family, token_ids, logits):
    model = models.build(family)
    keep = keeping(model, (0, 2, 3, 5, 7), (1, 6), (0, 1, 2, 3, 4, 6, 7))
    with mask(model, keep):
        masked = logits(model, token_ids)
    cut = copy.deepcopy(model)
    for layer in find_moe_layers(cut):
        slice_router(layer, keep.keep[layer.layer])
        slice_experts(layer, keep.keep[layer.layer])
    assert torch.equal(logits(cut, token_ids), masked)


def test_masked_model_uses_kept_experts_only_and_records_original_ids(token_ids, logits):
    model = models.build("qwen2_moe")
    layers = find_moe_layers(model)
    # The recorder is there first; the mask must still map ids before it looks.
    with Recorder(layers, norms=True) as recorder:
        with mask(model, keeping(model, (1, 4, 6))):
            masked = logits(model, token_ids)
        seen = recorder.take(torch.ones(24, dtype=torch.bool))
    assert {int(e) for layer in seen for e in layer.expert.ravel()} == {1, 4, 6}
    with mask(model, keeping(model, (1, 4, 6))):
        assert torch.equal(logits(model, token_ids), masked)


def test_remove_restores_the_same_tensors(family, token_ids, logits):
    model = models.build(family)
    before, tensors = logits(model, token_ids), dict(model.state_dict(keep_vars=True))
    hooks = [len(layer.experts._forward_pre_hooks) for layer in find_moe_layers(model)]
    masked = mask(model, keeping(model, (0, 1, 2)))
    assert "3 of 8 experts, on" in repr(masked)
    masked.remove()
    masked.remove()
    after = dict(model.state_dict(keep_vars=True))
    assert all(after[name] is value for name, value in tensors.items())
    assert hooks == [len(layer.experts._forward_pre_hooks) for layer in find_moe_layers(model)]
    assert torch.equal(logits(model, token_ids), before)
    assert "removed from" in repr(masked)


def test_exception_inside_restores(token_ids, logits):
    model = models.build("deepseek_v3")
    before = logits(model, token_ids)
    with pytest.raises(ZeroDivisionError), mask(model, keeping(model, (0, 1, 2))):
        raise ZeroDivisionError
    assert torch.equal(logits(model, token_ids), before)


def test_masking_twice_is_refused_and_changes_nothing(token_ids, logits):
    model = models.build("olmoe")
    with mask(model, keeping(model, (0, 1, 2))):
        masked = logits(model, token_ids)
        with pytest.raises(PlanError, match="masked already; remove that mask first"):
            mask(model, keeping(model, (0, 1)))
        assert torch.equal(logits(model, token_ids), masked)


def test_keeping_everything_changes_nothing(family, token_ids, logits):
    model = models.build(family)
    before = logits(model, token_ids)
    with mask(model, keeping(model, tuple(range(8)))):
        assert torch.equal(logits(model, token_ids), before)


def test_too_few_experts():
    model = models.build("qwen3_moe")
    with pytest.raises(
        PlanError, match="layer 2 would keep 1 experts but the router selects top_k=2"
    ):
        mask(model, keeping(model, (0, 1, 2), (3,)))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (Keep({1: (0, 1)}, 8, 2), r"MoE layers \[1\] but the model has \[0, 1, 2\]"),
        (Keep(dict.fromkeys(range(3), (0, 1)), 9, 2), "for 9 experts but layer 0 has 8"),
        (Keep(dict.fromkeys(range(3), (0, 8)), 8, 2), r"keeps \[0, 8\], which are not distinct"),
        (Keep(dict.fromkeys(range(3), (1, 1)), 8, 2), r"keeps \[1, 1\], which are not distinct"),
    ],
)
def test_plan_of_another_model(keep, message):
    with pytest.raises(PlanError, match=message):
        mask(models.build("mixtral"), keep)


def grouped(**changes):
    return models.build("deepseek_v3", n_group=2, topk_group=1, **changes)


def test_groups_keep_equal_numbers(token_ids, logits):
    model = grouped()
    keep = keeping(model, (0, 1, 3, 4, 6, 7))
    with mask(model, keep):
        masked = logits(model, token_ids)
    assert torch.equal(logits(prune(model, keep), token_ids), masked)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ((0, 1, 2, 4, 5), r"layer 1 keeps \[3, 2\] experts in its 2 router groups"),
        ((0, 4), "layer 1 keeps 1 experts in each router group, but the router needs 2 in each"),
    ],
)
def test_unequal_or_small_groups(kept, message):
    model = grouped()
    with pytest.raises(PlanError, match=message):
        mask(model, keeping(model, kept))


def test_families_that_cannot_be_cut():
    model = models.build("mixtral")
    layers = find_moe_layers(model)
    object.__setattr__(layers[0].layout, "fixed", "")
    fixed = type(layers[0].layout)(family="x", count="n", fixed="of a reason")
    layers = [type(layer)(**(vars(layer) | {"layout": fixed})) for layer in layers]
    with pytest.raises(UnsupportedModelError, match="cannot be masked or cut yet: of a reason"):
        check_keep(keeping(model, (0, 1)), layers)


def test_plan_from_a_file(tmp_path, token_ids, logits):
    model = models.build("mixtral")
    keep = keeping(model, (0, 1, 5))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(keep.as_json()))
    assert read_keep(path) == keep
    path.write_text('{"keep": 3}')
    with pytest.raises(SchemaError, match="is not a plan: keep, n_experts or top_k is missing"):
        read_keep(path)
    path.write_text('{"keep": {"0": ["x"]}, "n_experts": 8, "top_k": 2}')
    with pytest.raises(SchemaError, match="keep list that is not of integers"):
        read_keep(path)
    path.write_text('{"keep"')
    with pytest.raises(DataError, match="is not valid JSON"):
        read_keep(path)


def test_masked_folder_stands_for_the_model(model_folder, tmp_path, token_ids, logits, texts):
    out = tmp_path / "masked"
    keep = keeping(load_model(model_folder)[0], (0, 2, 4, 6))
    expected = logits(mask(model_folder, keep, out=out).model, token_ids)
    assert {file.name for file in out.iterdir()} == {"README.md", "moecollab.json"}
    model, tokenizer = load_model(out)
    assert torch.equal(logits(model, token_ids), expected)
    assert tokenizer is not None
    acts = extract(out, texts, out=tmp_path / "acts")
    assert set(acts.layer(1).expert.ravel().tolist()) <= {0, 2, 4, 6}
    with pytest.raises(OutputExistsError):
        mask(model_folder, keep, out=out)
    with pytest.raises(PlanError, match="masked already"):
        mask(out, keep)
    with pytest.raises(PlanError, match="prune the model that it masks"):
        prune(out, keep)


def test_masked_folder_whose_base_is_gone(tmp_path):
    base = models.save("mixtral", tmp_path / "base")
    mask(base, keeping(models.build("mixtral"), (0, 1)), out=tmp_path / "masked")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="base, which does not exist; put the model back"):
        load_model(tmp_path / "masked")


def test_loaded_model_without_a_path_has_no_folder(tmp_path):
    model = models.build("mixtral")
    with pytest.raises(DataError, match="not loaded from a path, so a masked folder cannot"):
        mask(model, keeping(model, (0, 1)), out=tmp_path / "masked")
    assert not (tmp_path / "masked").exists()
