"""What is recorded of every family is what its experts were given, and what they gave."""

import pytest
import torch

import zoo
from expert_twin import Heard, Spy, one_expert, routed_sum
from moecollab.models.capture import capture
from moecollab.models.routing import find_moe_layers, text_config
from moecollab.record.recorder import Recorder

SPREAD = (
    "mixtral",
    "deepseek_v3",
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
    if "name" in metafunc.fixturenames:
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
    torch.testing.assert_close(during, before, rtol=0, atol=2e-6)
    assert torch.equal(zoo.output_of(model, inputs), before)
    config = text_config(model)
    with torch.inference_mode():
        for layer, spy, one in zip(layers, spies, heard, strict=True):
            check_layer(layer, config, spy, one)


def check_layer(layer, config, spy, heard):
    assert heard.calls == 1
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
