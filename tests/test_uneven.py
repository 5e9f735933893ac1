"""Layers of different numbers of experts: native, padded, and what loads them."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import models
import zoo
from moecollab.errors import DataError, PlanError, SettingsError, UnsupportedModelError
from moecollab.models.groups import router_groups
from moecollab.models.keep import Keep
from moecollab.models.loading import load_model
from moecollab.models.masked import Mask, kept_of
from moecollab.models.masking import mask
from moecollab.models.routing import find_moe_layers
from moecollab.models.uneven import shrunk
from moecollab.pruning.merging.merging import merge
from moecollab.pruning.pruning import prune

SPREAD = ("deepseek_v32", "gpt_oss", "ernie4_5_moe", "afmoe", "zaya", "longcat_flash", "dbrx")
"""Families tried every day: each kind of bias, groups, a live count, and two that leak."""

PADDED = {
    *("afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v32", "dots1"),
    *("dots3_note_text", "exaone_moe", "glm4_moe", "glm4_moe_lite"),
    *("glm4v_moe_text", "glm5_next_text", "glm_moe_dsa", "gpt_oss", "hy_v3", "hy_v4"),
    *("inkling2_text", "inkling_text", "kimi_linear", "kolibri1", "laguna", "lfm2_moe"),
    *("mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text", "muse_spark_text", "nemotron_h"),
    *("nemotron_h/latent", "openai_privacy_filter", "solar_open", "step3p5"),
}
"""Families of the zoo whose routers have a bias that bars an expert and shifts no weight."""

pytestmark = pytest.mark.filterwarnings("ignore")


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        chosen = zoo.ZOO if metafunc.config.getoption("--all-families") else SPREAD
        metafunc.parametrize("name", chosen)


def uneven_keep(layers):
    """All experts of the first layer, fewer of the next, and so on in turn."""
    n_groups = max(getattr(router_groups(layer), "count", 1) for layer in layers)
    gone = {1: {1, 4, 6}, 2: {1, 3, 4, 6}}.get(n_groups, set())
    few = tuple(expert for expert in range(8) if expert not in gone)
    kept = {layer.layer: (few if i % 2 else tuple(range(8))) for i, layer in enumerate(layers)}
    return Keep(kept, 8, layers[0].top_k)


def ready(name):
    """A model of the zoo that can be cut, its plan, and its output under a mask."""
    if zoo.missing(name):
        pytest.skip(zoo.missing(name))
    model = zoo.build(name)
    layers = find_moe_layers(model)
    keep = uneven_keep(layers)
    if layers[0].layout.fixed or layers[0].layout.uncut or keep.uniform:
        pytest.skip("its layers cannot keep different numbers")
    with Mask(model, keep):
        return model, keep, zoo.output_of(model, zoo.batch())


def test_native_layers_are_loaded_as_they_were(name, tmp_path):
    model, keep, masked = ready(name)
    pruned = prune(model, keep, uneven="native", out=tmp_path / "native")
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(zoo.output_of(pruned, zoo.batch()), masked, **close)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        type(pruned).from_pretrained(tmp_path / "native")
    with shrunk(type(pruned)):
        again = type(pruned).from_pretrained(tmp_path / "native").eval()
    counts = [layer.n_experts for layer in find_moe_layers(again)]
    assert counts == [len(kept) for kept in keep.keep.values()]
    torch.testing.assert_close(zoo.output_of(again, zoo.batch()), masked, **close)


def test_padded_layers_never_choose_the_padding(name, tmp_path):
    model, keep, masked = ready(name)
    if name not in PADDED:
        with pytest.raises(UnsupportedModelError, match="cannot be padded, as their router"):
            prune(model, keep, uneven="pad")
        return
    pruned = prune(model, keep, uneven="pad", out=tmp_path / "padded")
    again = type(pruned).from_pretrained(tmp_path / "padded").eval()
    assert {layer.n_experts for layer in find_moe_layers(again)} == {8}
    torch.testing.assert_close(zoo.output_of(again, zoo.batch()), masked, rtol=0, atol=1e-5)


def test_padding_is_as_wide_as_the_widest_layer_and_no_wider(tmp_path):
    model = models.build("deepseek_v3")
    keep = Keep({1: (0, 2, 5, 7), 2: (1, 6)}, 8, 2)
    prune(model, keep, uneven="pad", out=tmp_path / "padded")
    second = find_moe_layers(model)[1]
    assert second.n_experts == 4
    note = json.loads((tmp_path / "padded" / "moecollab.json").read_text())
    assert note["padding"] == {"2": [0, 2]}  # experts 0 and 2 beside 1 and 6
    bias = second.router.e_score_correction_bias
    assert (bias < -1e4).tolist() == [True, False, True, False]
    assert kept_of(tmp_path / "padded").keep == keep.keep


def test_native_folder_is_a_model_to_everyone_who_asks_load_model(tmp_path, token_ids, logits):
    base = models.save("qwen3_moe", tmp_path / "base")
    keep = Keep({1: (0, 2, 5, 7), 2: (1, 3, 6)}, 8, 2)
    prune(base, keep, uneven="native", out=tmp_path / "native")
    with mask(base, keep) as masked:
        expected = logits(masked.model, token_ids)
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == 4
    assert config["moecollab"] == {"experts_per_layer": {"1": 4, "2": 3}}
    model, tokenizer = load_model(tmp_path / "native")
    torch.testing.assert_close(logits(model, token_ids), expected, rtol=0, atol=1e-5)
    assert tokenizer is not None
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    whole = AutoModelForCausalLM.from_pretrained(base)  # the class is as it was
    assert {layer.n_experts for layer in find_moe_layers(whole)} == {8}
    with pytest.raises(PlanError, match="for 4 experts but layer 2 has 3"):
        prune(tmp_path / "native", Keep({1: (0, 1), 2: (0, 1)}, 4, 2))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"experts_per_layer": {"1": 4, "2": 1}},
            r"1 experts for layer 2, which must be in \[2",
        ),
        ({"experts_per_layer": {"1": 4}}, r"of layers \[1\] but the model has \[1, 2\]"),
        ({"experts_per_layer": {"1": "x", "2": 3}}, "without experts_per_layer of numbers"),
        ("nonsense", "without experts_per_layer of numbers"),
    ],
)
def test_damaged_numbers(entry, message, tmp_path):
    base = models.save("qwen3_moe", tmp_path / "base", num_experts=4)
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moecollab": entry}))
    with pytest.raises(DataError, match=message):
        load_model(base)


def test_unknown_way():
    model = models.build("mixtral")
    with pytest.raises(SettingsError, match="uneven is 'stretch'"):
        prune(model, Keep(dict.fromkeys(range(3), (0, 1)), 8, 2), uneven="stretch")


def test_refusal_to_pad_changes_nothing(token_ids, logits):
    model = models.build("mixtral")
    before = logits(model, token_ids)
    keep = Keep({0: (0, 1), 1: (0, 1, 2), 2: (0, 1)}, 8, 2)
    with pytest.raises(UnsupportedModelError, match="mixtral cannot be padded, as"):
        prune(model, keep, uneven="pad")
    with pytest.raises(PlanError, match="layer 0 keeps 2 experts and layer 1 keeps 3"):
        prune(model, keep)
    assert torch.equal(logits(model, token_ids), before)


@pytest.mark.parametrize("given", ["folder", "loaded", "half precision"])
def test_padding_cannot_be_kept(given, tmp_path):
    base = models.save("deepseek_v3", tmp_path / "base")
    keep = Keep({1: (0, 2, 5, 7), 2: (1, 6)}, 8, 2)
    prune(base, keep, uneven="pad", out=tmp_path / "padded")  # experts 0 and 2 of layer 2 pad
    model = tmp_path / "padded"
    if given != "folder":
        model = load_model(model)[0]
    if given == "half precision":
        model = model.bfloat16()
    with pytest.raises(PlanError, match=r"layer 2 would keep experts \[0\], which are padding"):
        prune(model, Keep({1: (0, 1), 2: (0, 1)}, 4, 2), out=tmp_path / "small")
    padded = Keep({1: (0, 1), 2: (0, 1)}, 4, 2)
    with pytest.raises(PlanError, match=r"layer 2 would keep experts \[0\], which are padding"):
        mask(model, padded, out=tmp_path / "masked")
    for groups in (padded, {1: [[0, 1], [2, 3]], 2: [[0, 1], [2, 3]]}):
        with pytest.raises(PlanError, match=r"layer 2 would keep experts \[0.*\], which are padd"):
            merge(model, groups, how="dek", corpus=[np.arange(3, 20)], out=tmp_path / "merged")
    assert not any((tmp_path / name).exists() for name in ("masked", "merged"))
    assert mask(model, padded, mode="zero")  # an analysis, after which the routers are as they were
    prune(load_model(model)[0], Keep({1: (0, 1), 2: (1, 3)}, 4, 2), out=tmp_path / "small")
