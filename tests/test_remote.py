"""Remote code with experts that are modules is recorded, masked and cut after one call."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import models
import zoo
from expert_twin import Heard
from moecollab.errors import DataError, PlanError, UnsupportedModelError
from moecollab.models.capture import capture
from moecollab.models.expert_modules import _row_keys
from moecollab.models.keep import Keep
from moecollab.models.layout import Layout
from moecollab.models.loading import load_model
from moecollab.models.masked import Mask
from moecollab.models.registry import register_layout, unregister_layout
from moecollab.models.routing import find_moe_layers
from moecollab.pruning.pruning import prune
from moecollab.record.recorder import Recorder

REMOTE = Path(__file__).parent / "remote"
sys.path.append(str(REMOTE))

import modeling_small_moe as ours  # noqa: E402
import register_small_moe as registers  # noqa: E402

CODE = "modeling_small_moe"


def save(folder, dispatch):
    """A folder as a hub repository of remote code has it."""
    config = ours.SmallMoeConfig(dispatch=dispatch)
    torch.manual_seed(0)
    models.randomised(ours.SmallMoeForCausalLM(config), 0).save_pretrained(folder)
    shutil.copy(REMOTE / f"{CODE}.py", folder)
    written = json.loads((folder / "config.json").read_text())
    written["auto_map"] = {
        "AutoConfig": f"{CODE}.SmallMoeConfig",
        "AutoModelForCausalLM": f"{CODE}.SmallMoeForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture(params=["sorted", "looped"])
def dispatch(request):
    return request.param


@pytest.fixture
def folder(dispatch, tmp_path):
    getattr(registers, f"register_{dispatch}")()
    yield save(tmp_path / "model", dispatch)
    unregister_layout("small_moe")


def heard_of(model, inputs):
    """Layers, what is heard of each, inputs of each block, and logits while listening."""
    layers = find_moe_layers(model)
    heard, given, handles = [], [], []
    for layer in layers:
        heard.append(Heard())
        handles += capture(layer, heard[-1], outputs=True).attach()
        handles.append(layer.block.register_forward_hook(lambda _m, a, o: given.append((a[0], o))))
    logits = zoo.output_of(model, inputs)
    for handle in handles:
        handle.remove()
    return layers, heard, given, logits


def test_everything_is_recorded(folder):
    model, inputs = load(folder), zoo.batch()
    assert type(model).__module__.startswith("transformers_modules")
    before = zoo.output_of(model, inputs)
    layers, heard, given, during = heard_of(model, inputs)
    assert torch.equal(during, before)
    assert [layer.layer for layer in layers] == [1, 2]
    close = {"rtol": 0, "atol": 1e-6}
    for layer, one, (hidden, output) in zip(layers, heard, given, strict=True):
        flat = hidden.reshape(-1, hidden.shape[-1])
        with torch.inference_mode():
            every = torch.stack([expert(flat) for expert in layer.experts], dim=1)
            slots = every.gather(1, one.ids[..., None].expand(-1, -1, flat.shape[1]))
            torch.testing.assert_close(one.slots, slots, **close)
            total = (slots * one.weights[..., None]).sum(dim=1)
            torch.testing.assert_close(one.total_sum, total, **close)
            if hasattr(layer.block, "shared_experts"):
                total = total + layer.block.shared_experts(flat)
            torch.testing.assert_close(total, output.reshape(total.shape), **close)


def test_masked_equals_pruned_equals_reloaded(folder, tmp_path):
    model, inputs = load(folder), zoo.batch()
    layers, full = find_moe_layers(model), zoo.output_of(model, inputs)
    keep = Keep({layer.layer: (0, 2, 3, 5, 7) for layer in layers}, 8, 2)
    with Mask(model, keep):
        masked = zoo.output_of(model, inputs)
        _, heard, _, _ = heard_of(model, inputs)
        assert all(set(one.ids.unique().tolist()) == {0, 2, 3, 5, 7} for one in heard)
        with pytest.raises(PlanError, match="masked already"):
            Mask(model, keep)
    assert torch.equal(zoo.output_of(model, inputs), full)
    assert not torch.equal(masked, full)
    pruned = prune(model, keep, out=tmp_path / "pruned")
    torch.testing.assert_close(zoo.output_of(pruned, inputs), masked, rtol=0, atol=1e-6)
    again = zoo.output_of(load(tmp_path / "pruned"), inputs)
    torch.testing.assert_close(again, masked, rtol=0, atol=1e-6)


def test_extract_takes_the_loaded_model(folder, tmp_path):
    texts = [{"text": "Owls hunt at night. " * 3}, {"text": "Habeas corpus."}]
    acts = registers.record(folder, texts, models.build_tokenizer(), tmp_path / "acts")
    assert list(acts.layers) == [1, 2]


def test_code_is_not_run_unasked(folder):
    with pytest.raises(DataError, match="brings its own code, which is not run unasked; load it"):
        load_model(folder)


def test_unknown_family_of_remote_code_says_how_to_add_it(tmp_path):
    folder = save(tmp_path / "model", "sorted")
    with pytest.raises(UnsupportedModelError, match=r"register_layout.*docs/models.md"):
        load_model(folder)
    with pytest.raises(UnsupportedModelError, match="register_layout"):
        find_moe_layers(load(folder))


@pytest.mark.parametrize("dispatch", ["looped"], indirect=True)
def test_a_wrong_routing_function_is_found_out(folder):
    def reversed_choice(block, logits):
        ids, weights = registers.choose(block, -logits)
        return ids, weights

    register_layout(
        Layout(
            family="small_moe",
            count="n_routed_experts",
            capture="modules",
            routing=reversed_choice,
        ),
        replace=True,
    )
    model = load(folder)
    for norms in (False, True):
        with (
            pytest.raises(DataError, match="ran on other rows than its router chose"),
            Recorder(find_moe_layers(model), norms=norms),
        ):
            zoo.output_of(model, zoo.batch())


@pytest.mark.parametrize("dispatch", ["looped"], indirect=True)
def test_logits_need_a_routing_function(folder):
    register_layout(
        Layout(family="small_moe", count="n_routed_experts", capture="modules"), replace=True
    )
    model = load(folder)
    with (
        pytest.raises(UnsupportedModelError, match="returns no ids and weights; register a layout"),
        Recorder(find_moe_layers(model), norms=True),
    ):
        zoo.output_of(model, zoo.batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_row_keys_tell_rows_apart_and_know_equal_ones(dtype):
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(50, 33, generator=draw).to(dtype)
    order = torch.randperm(50, generator=draw)
    keys = _row_keys(rows)
    assert torch.equal(_row_keys(rows[order]), keys[order])
    assert len(np.unique(keys.numpy())) == 50
