"""What is recorded of every family is what its experts were given, and what they gave."""

import json

import pytest
import torch

import models
import residual_twin
import zoo
from expert_twin import Heard, Spy, one_expert, routed_sum
from make_docs import MEASURED
from moecollab import score
from moecollab.errors import DataError, UnsupportedModelError
from moecollab.models.capture import capture
from moecollab.models.keep import Keep
from moecollab.models.layout import BUILT_IN
from moecollab.models.masked import Mask
from moecollab.models.registry import layout_of
from moecollab.models.routing import find_moe_layers, text_config
from moecollab.pruning.pruning import prune
from moecollab.record.extraction import extract
from moecollab.record.recorder import Recorder
from moecollab.record.residual import _numbered

SPREAD = (
    "mixtral",
    "deepseek_v3",
    "deepseek_v4",
    "gpt_oss",
    "dbrx",
    "nemotron_h/latent",
    "gemma4_text",
    "llama4_text",
    "llama4_text/top-2",
    "jetmoe",
    "longcat_flash",
    "ernie4_5_vl_moe_text",
    "zaya",
    "laguna",
    "cohere2_moe/averaged",
)
"""Families tried every day: one of each way to capture and of each oddity."""

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")

pytestmark = pytest.mark.filterwarnings("ignore")


def pytest_generate_tests(metafunc):
    marks = metafunc.definition.iter_markers("parametrize")
    if "name" in metafunc.fixturenames and not any(mark.args[0] == "name" for mark in marks):
        chosen = zoo.ZOO if metafunc.config.getoption("--all-families") else SPREAD
        metafunc.parametrize("name", chosen)


@pytest.fixture
def model(name):
    reason = zoo.missing(name)
    if reason:
        pytest.skip(reason)
    return zoo.build(name)


def listened(layers, model, inputs):
    """What is heard of each layer, and the model's output while it is listened to."""
    heard = [Heard() for _ in layers]
    handles = []
    for layer, one in zip(layers, heard, strict=True):
        handles += capture(layer, one, outputs=True).attach()
    try:
        output = zoo.output_of(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return heard, output


def spied(layers, model, inputs):
    """Inputs and outputs of each layer's experts, and the model's output."""
    spies = [Spy(layer) for layer in layers]
    output = zoo.output_of(model, inputs)
    for spy in spies:
        spy.remove()
    return spies, output


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_recorded_routing_recomputes_the_sum(model, name, implementation):
    try:
        model.set_experts_implementation(implementation)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    layers, inputs = find_moe_layers(model), zoo.batch()
    spies, before = spied(layers, model, inputs)
    heard, during = listened(layers, model, inputs)
    assert torch.equal(during, before)
    assert torch.equal(zoo.output_of(model, inputs), before)
    config = text_config(model)
    with torch.inference_mode():
        for layer, spy, one in zip(layers, spies, heard, strict=True):
            check_layer(layer, config, spy, one)


def check_layer(layer, config, spy, heard):
    assert heard.calls == 1
    assert spy.output.std() > 0.02, "experts that add nothing show nothing"
    assert heard.ids.shape == heard.weights.shape == (24, layer.top_k)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(routed_sum(layer, config, spy.hidden, heard), spy.output, **close)
    torch.testing.assert_close(heard.total_sum, spy.output, **close)
    used = (heard.ids < layer.n_experts) & (heard.weights != 0)
    assert used.any()
    for number in range(layer.n_experts):
        token, slot = torch.where((heard.ids == number) & used)
        if len(token):
            expected = expected_output(layer, config, number, spy.hidden[token], heard, token, slot)
            torch.testing.assert_close(heard.slots[token, slot], expected, **close)


def expected_output(layer, config, number, hidden, heard, token, slot):
    """Output before the weight, as the captures define it."""
    if layer.layout.family != "llama4":
        return one_expert(layer, config, number, hidden)
    gate = heard.weights[token, slot][:, None]
    return one_expert(layer, config, number, gate * hidden) / gate


def test_recorder_leaves_padding_out(model, name):
    layers, inputs = find_moe_layers(model), zoo.batch()
    real = inputs["attention_mask"].bool().reshape(-1)
    with torch.inference_mode(), Recorder(layers, norms=True) as recorder:
        model(**inputs)
        some = recorder.take(real)
        model(**inputs)
        every = recorder.take(torch.ones_like(real))
    for part, whole in zip(some, every, strict=True):
        assert part.expert.shape == (20, layers[0].top_k)
        for field in ("expert", "weight", "norm", "peak"):
            chosen = getattr(whole, field)[real.numpy()]
            assert (getattr(part, field) == chosen).all()


NOT_LINEAR = ("axk1", "gemma4")
"""Families that norm what the experts add before it leaves the block."""


def test_scale_is_what_the_block_applies_to_the_sum(model, name):
    layer = find_moe_layers(model)[-1]
    spy = Spy(layer)
    outputs = []
    for factor in (1.0, 0.0):
        handle = layer.experts.register_forward_hook(lambda _m, _a, out, f=factor: out * f)
        block = layer.block.register_forward_hook(lambda _m, _a, out: outputs.append(first(out)))
        zoo.output_of(model, zoo.batch())
        handle.remove()
        block.remove()
    spy.remove()
    added = outputs[0] - outputs[1]
    if layer.layout.family in NOT_LINEAR or added.shape[-1] != spy.output.shape[-1]:
        pytest.skip("the block's output is not linear in what the experts add")
    expected = layer.scale * spy.output
    if layer.layout.family == "jetmoe":
        expected = expected + layer.experts.bias
    torch.testing.assert_close(added, expected.reshape(added.shape), rtol=0, atol=1e-5)


def first(output):
    """The hidden states of a block's output, flattened."""
    found = output[0] if isinstance(output, tuple) else output
    return found.detach().reshape(-1, found.shape[-1]).clone()


def keep_of(layers):
    """Two of eight experts go; with four groups of two, none can."""
    router = layers[0].router
    limited = getattr(router, "topk_method", "") != "greedy"
    gone = set() if limited and getattr(router, "num_group", 1) == 4 else {1, 4}
    kept = tuple(expert for expert in range(layers[0].n_experts) if expert not in gone)
    return Keep({layer.layer: kept for layer in layers}, layers[0].n_experts, layers[0].top_k)


def test_masked_equals_pruned_or_says_why_not(model, name):
    layers, inputs = find_moe_layers(model), zoo.batch()
    layout, keep = layers[0].layout, keep_of(layers)
    full = zoo.output_of(model, inputs)
    if layout.fixed:
        with pytest.raises(UnsupportedModelError, match="cannot be masked or cut yet"):
            Mask(model, keep)
        return
    with Mask(model, keep):
        masked = zoo.output_of(model, inputs)
        heard, _ = listened(layers, model, inputs)
        for layer, one in zip(layers, heard, strict=True):
            used = one.ids[(one.weights != 0) & (one.ids < layer.n_experts)]
            assert set(used.unique().tolist()) <= set(keep.keep[layer.layer])
    assert torch.equal(zoo.output_of(model, inputs), full)
    if layout.uncut:
        with pytest.raises(UnsupportedModelError, match="cannot be cut yet"):
            prune(model, keep)
        return
    pruned = zoo.output_of(prune(model, keep), inputs)
    torch.testing.assert_close(pruned, masked, rtol=0, atol=1e-5)


def test_pruned_model_is_loaded_as_it_was_saved(model, name, tmp_path):
    layers, inputs = find_moe_layers(model), zoo.batch()
    if layers[0].layout.fixed or layers[0].layout.uncut:
        pytest.skip("cannot be cut")
    pruned = prune(model, keep_of(layers), out=tmp_path / "pruned")
    before = zoo.output_of(pruned, inputs)
    again = type(pruned).from_pretrained(tmp_path / "pruned").eval()
    torch.testing.assert_close(zoo.output_of(again, inputs), before, rtol=0, atol=5e-6)


def test_every_layout_is_tried():
    names = {name.partition("/")[0] for name in zoo.ZOO}
    tried = {layout_of(name, name).family for name in names}
    # `step3p7` is the name of the whole model, whose text part is called otherwise.
    assert set(BUILT_IN) - tried == {"step3p7"}


def test_measurements_are_of_every_family():
    found = json.loads(MEASURED.read_text())["families"]
    assert set(found) == set(BUILT_IN) - {"step3p7"}
    assert len(found) == 68
    assert all(one["error"] <= 1e-5 for one in found.values())


def skipping():
    """A model some of whose tokens choose to skip the experts."""
    if zoo.missing("zaya"):
        pytest.skip(zoo.missing("zaya"))
    model = zoo.build("zaya")
    for layer in find_moe_layers(model):
        layer.router.balancing_biases[-1] = 0.1
    return model


def test_skipped_tokens_use_no_expert():
    model, inputs = skipping(), zoo.batch()
    layers = find_moe_layers(model)
    spies, _ = spied(layers, model, inputs)
    heard, _ = listened(layers, model, inputs)
    assert sum(int((one.weights == 0).sum()) for one in heard) > 0
    with torch.inference_mode():
        for layer, spy, one in zip(layers, spies, heard, strict=True):
            check_layer(layer, model.config, spy, one)


def test_other_counts_in_each_layer_under_a_live_count():
    model, inputs = skipping(), zoo.batch()
    layers = find_moe_layers(model)
    kept = {0: (0, 3), 1: (1, 2, 6), 2: (5,), 3: (0, 7)}
    with Mask(model, Keep(kept, 8, 1)):
        heard, _ = listened(layers, model, inputs)
    for layer, one in zip(layers, heard, strict=True):
        assert (one.weights == 0).any(), "no token skips"
        assert set(one.ids[one.weights != 0].tolist()) <= set(kept[layer.layer])
    assert all(layer.router.config is model.config for layer in layers)


@pytest.mark.parametrize("name", ["llama4_text", "llama4_text/top-2", "jetmoe", "longcat_flash"])
def test_listening_in_half_precision(model):
    model = model.to(torch.bfloat16)
    layers, inputs = find_moe_layers(model), zoo.batch()
    before = zoo.output_of(model, inputs)
    heard, during = listened(layers, model, inputs)
    assert torch.equal(during, before)
    for one in heard:
        total = (one.slots * one.weights[..., None]).sum(dim=1)
        torch.testing.assert_close(total, one.total_sum, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["longcat_flash"])
def test_slots_that_are_not_used_count_nowhere(model, name, tmp_path):
    model, texts = zoo.build(name, vocab_size=260), [{"text": "Owls hunt at night."}]
    acts = extract(model, texts, out=tmp_path / "acts", tokenizer=models.build_tokenizer())
    counts = score("frequency", acts).values.sum(axis=1)
    assert (counts > 0).all()
    assert (counts < acts.n_tokens * acts.top_k).any()


@pytest.mark.parametrize("name", ["ernie4_5_vl_moe_text"])
def test_tokens_of_images_are_refused(model):
    layers, inputs = find_moe_layers(model), zoo.batch()
    kinds = torch.zeros_like(inputs["input_ids"])
    kinds[1, 3:6] = 1
    real = inputs["attention_mask"].bool().reshape(-1)
    with torch.inference_mode(), Recorder(layers, norms=True) as recorder:
        model(**inputs, moe_mm_token_type_ids=kinds)
        with pytest.raises(DataError, match="saw 21 rows in 1 calls for 24 positions"):
            recorder.take(real)


def test_shift_is_of_what_the_layer_adds(model, name):
    layers = find_moe_layers(model)
    if layers[0].layout.shift:
        with pytest.raises(UnsupportedModelError, match=f"of {layers[0].layout.family}: "):
            Recorder(layers, norms=True, shift=model)
        return
    if name == "nemotron_h/latent":
        pytest.skip("its experts work in another space, which the first batch finds")
    inputs = zoo.batch()
    decoders = [model.get_submodule(_numbered(layer.name)) for layer in layers]
    real = torch.ones(inputs["input_ids"].numel(), dtype=torch.bool)
    with torch.inference_mode(), Recorder(layers, norms=True, shift=model) as recorder:
        model(**inputs, use_cache=False)
        found = recorder.take(real)
    calls = residual_twin.seen_calls(model, decoders, inputs)
    for layer, decoder, (call, output), one in zip(layers, decoders, calls, found, strict=True):
        with torch.inference_mode():
            added = output - residual_twin.without(layer.experts, decoder, call)
            stream = residual_twin.without(layer.block, decoder, call)
        if hasattr(decoder, "shared_mlp"):
            pytest.fail("shared experts beside the block would be part of this stream")
        cosine = torch.cosine_similarity(stream, stream + added, dim=-1).reshape(-1)
        shift = torch.from_numpy(one.shift)
        torch.testing.assert_close(shift, (1 - cosine).clamp_min(0), rtol=1e-3, atol=1e-5)


SIGMOID = {
    *("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "glm4v_moe_text"),
    *("glm5_next_text", "llama4_text", "llama4_text/top-2", "hy_v3", "hy_v4", "minimax_m2"),
    *("minimax_m3_vl_text", "dots1", "dots3_note_text", "lfm2_moe", "nemotron_h"),
    *("nemotron_h/latent", "kimi_linear", "bailing_hybrid", "solar_open", "afmoe", "exaone_moe"),
    *("axk1", "axk2", "beam", "cohere2_moe/averaged", "flint", "inkling_text", "inkling2_text"),
    *("kolibri1", "laguna", "mimo_v2_flash", "muse_spark_text", "step3p5"),
}
SCORES = dict.fromkeys(SIGMOID, "sigmoid") | {
    "deepseek_v4": "sqrt_softplus",
    "gemma4_text": "probabilities",
}
"""What routers make of their logits, as their code says; softmax where nothing is said."""


def test_probabilities_explain_the_weights(model, name):
    layers = find_moe_layers(model)
    with torch.inference_mode(), Recorder(layers, norms=False, probability=True) as recorder:
        inputs = zoo.batch()
        model(**inputs)
        real = inputs["attention_mask"].reshape(-1).bool()
        found = recorder.take(real)
        chosen = [watch.mass.probability.chosen[1] for watch in recorder._watches]
    assert set(chosen) == {SCORES.get(name, "softmax")}
    for layer, routing in zip(layers, found, strict=True):
        mass = routing.mass[0, : layer.n_experts]
        assert (mass > 0).all()
        # Identity and skip experts have their part of a softmax.
        assert mass.sum() <= real.sum() * (1 + 1e-5)
        if name not in ("zaya", "longcat_flash"):
            assert mass.sum() == pytest.approx(float(real.sum()), rel=1e-5)
