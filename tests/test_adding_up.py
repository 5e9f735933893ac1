"""Weights that a layout gives for experts that are modules are those that the block uses."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from expert_twin import Heard
from moecollab.errors import DataError, UnsupportedModelError
from moecollab.models.adding_up import WeightedSum
from moecollab.models.capture import capture
from moecollab.models.layout import Layout
from moecollab.models.routing import MoeLayer

sys.path.append(str(Path(__file__).parent / "remote"))

import modeling_small_moe as ours
import register_small_moe as registers

LAYOUT = Layout(
    family="small_moe", count="n_routed_experts", capture="modules", routing=registers.choose
)
WRONG = "does not return the outputs of its experts times the weights that the layout"
TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Block(nn.Module):
    """A block of remote code, written by its definition, with whatever such code adds."""

    def __init__(self, top_k=2, shared=0, factor=1.0, inner=1.0, last=None, before=None):
        super().__init__()
        sizes = {"hidden_size": 32, "moe_intermediate_size": 16}
        config = SimpleNamespace(**sizes)
        self.top_k, self.factor, self.inner = top_k, factor, inner
        self.gate = nn.Linear(32, 2 * top_k + 4, bias=False)
        self.experts = nn.ModuleList(ours.Expert(config) for _ in range(2 * top_k + 4))
        self.shared = nn.ModuleList(ours.Expert(config) for _ in range(shared))
        self.shared_gate = nn.Linear(32, 1)
        self.dropout = nn.Dropout(0.5)
        self.last = last or nn.Identity()
        self.before = before or (lambda rows: rows)

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        ids, weight = registers.choose(self, self.gate(flat.to(self.gate.weight.dtype)))
        weight, total = (weight * self.inner).to(flat.dtype), torch.zeros_like(flat)
        rows = self.before(flat)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            out = expert(rows[token])
            out = out[0] if isinstance(out, tuple) else out
            total.index_add_(0, token, out * weight[token, slot, None])
        total = self.dropout(total * self.factor).view_as(hidden)
        for one in self.shared:
            total += self.shared_gate(hidden).sigmoid() * one(hidden)
        return self.last(total), None  # as remote code returns the router's logits


def build(seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    block = Block(**changes)
    with torch.no_grad():
        for value in block.parameters():
            value.copy_(torch.randn(value.shape) * 0.3)
    return block.to(dtype).eval()


def layer_of(block, layout=LAYOUT):
    n_experts = len(block.experts)
    return MoeLayer(0, "layers.0.mlp", block, block.gate, block.experts, n_experts, 2, layout)


def run(layer, hidden, *, outputs=True):
    """What is heard of one call."""
    heard = Heard()
    handles = capture(layer, heard, outputs=outputs).attach()
    try:
        with torch.inference_mode():
            layer.block(hidden)
    finally:
        for handle in handles:
            handle.remove()
    return heard, len(handles)


def rows(seed=9, dtype=torch.float32, n=12):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, 32, generator=draw).to(dtype)


def not_renormalised(block, logits):
    weight, ids = logits.softmax(dim=-1).topk(block.top_k, dim=-1)
    return ids, weight


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("outputs", [False, True])
def test_right_weights_pass_and_forgotten_renormalisation_does_not(dtype, shared, outputs):
    for seed in range(4):
        block, hidden = build(seed, dtype, shared=shared), rows(seed, dtype)
        heard, _ = run(layer_of(block), hidden, outputs=outputs)
        assert (heard.total_sum is not None) == outputs
        wrong = layer_of(block, replace(LAYOUT, routing=not_renormalised))
        with pytest.raises(UnsupportedModelError, match=f"{WRONG} of 'small_moe' gives; correct"):
            run(wrong, hidden, outputs=outputs)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shared", [0, 1])
def test_a_forgotten_factor_is_found_and_one_that_is_named_is_not(dtype, shared):
    after = build(dtype=dtype, shared=shared, factor=1.7)
    inside = build(dtype=dtype, shared=shared, inner=1.7)
    for block in (after, inside):
        with pytest.raises(UnsupportedModelError, match=r"a factor\?\) or name a factor after"):
            run(layer_of(block), rows(dtype=dtype))
    run(layer_of(after, replace(LAYOUT, scale="factor")), rows(dtype=dtype))


def test_many_experts_in_half_precision_are_within_rounding():
    for dtype in TYPES:
        run(layer_of(build(dtype=dtype, top_k=32, shared=1)), rows(dtype=dtype, n=300))


def test_a_whole_decoder_layer_may_be_the_block():
    torch.manual_seed(3)
    block = ours.Layer(ours.SmallMoeConfig(), 1).eval()
    for value in block.parameters():
        torch.nn.init.normal_(value, std=0.2)
    mask, moe = torch.ones(12, 12, dtype=torch.bool).tril(), block.mlp
    block.forward = partial(block.forward, mask=mask)
    layer = MoeLayer(1, "layers.1", block, moe.gate, moe.experts, 8, 2, LAYOUT)
    run(replace(layer, layout=replace(LAYOUT, routing=None)), rows())
    doubled = replace(LAYOUT, routing=lambda _block, found: (found[0], 2 * found[1]))
    with pytest.raises(UnsupportedModelError, match=WRONG):
        run(replace(layer, layout=doubled), rows())


def test_what_follows_the_sum_explains_nothing_and_can_be_said():
    block = build(shared=1, last=nn.RMSNorm(32))
    with pytest.raises(UnsupportedModelError, match="something else follows the sum, say what in"):
        run(layer_of(block), rows())
    heard, _ = run(layer_of(block, replace(LAYOUT, shift="a norm follows the sum")), rows())
    assert heard.total_sum is not None


def test_it_is_looked_at_once_for_each_layout():
    block = build(shared=1)
    _, at_first = run(layer_of(block), rows())
    _, later = run(layer_of(block), rows())
    assert later < at_first
    with pytest.raises(UnsupportedModelError, match=WRONG):
        run(layer_of(block, replace(LAYOUT, routing=not_renormalised)), rows())


def test_what_is_not_finite_is_left_to_who_listens():
    block = build(shared=1)
    with torch.no_grad():
        block.shared[0].down_proj.weight.fill_(torch.nan)
    _, at_first = run(layer_of(block), rows())
    assert run(layer_of(block), rows())[1] == at_first  # it could not be told
    hidden = rows()
    hidden[1, 3:7] = torch.nan  # as some models leave padding
    block = build(shared=1)
    with pytest.raises(UnsupportedModelError, match=WRONG):
        run(layer_of(block, replace(LAYOUT, routing=not_renormalised)), hidden)
    heard, _ = run(layer_of(block), hidden)
    assert heard.total_sum.isnan().any()


def test_nothing_is_kept_once_it_is_known():
    layer, hidden = layer_of(build(shared=1)), rows()
    run(layer, hidden)
    listening = capture(layer, Quiet(), outputs=True)
    handles = listening.attach()
    with torch.inference_mode():
        for _ in range(3):
            layer.block(hidden)
    assert listening.beside.given == []
    for handle in handles:
        handle.remove()


class Quiet:
    def routing(self, ids, weights):
        pass

    def outputs(self, rows, places):
        pass

    def total(self, routed):
        pass


def test_a_router_in_float32_beside_experts_in_half_precision():
    block, hidden = build(dtype=torch.bfloat16, shared=1), rows(dtype=torch.bfloat16)
    block.gate.float()
    heard, _ = run(layer_of(block), hidden)
    flat = hidden.reshape(-1, 32)
    with torch.inference_mode():
        every = torch.stack([expert(flat) for expert in block.experts], dim=1)
    slots = every.gather(1, heard.ids[..., None].expand(-1, -1, 32)).float()
    torch.testing.assert_close(heard.slots, slots, rtol=0.02, atol=0.02)


def test_a_router_in_half_precision_beside_experts_in_float32():
    block, hidden = build(), rows()
    block.gate.to(torch.bfloat16)
    heard, _ = run(layer_of(block), hidden)
    assert not heard.slots.isnan().any()


def test_rows_that_nobody_was_given_say_how_to_record():
    block = build(before=lambda rows: 2 * rows)
    with pytest.raises(DataError, match="ran on rows that neither the router nor the block was"):
        run(layer_of(block), rows())
    heard, _ = run(layer_of(block), rows(), outputs=False)
    assert heard.calls == 1


def test_experts_may_return_more_than_their_output():
    block = build()
    for expert in block.experts:
        expert.register_forward_hook(lambda _m, _a, out: (out, None))
    heard, _ = run(layer_of(block), rows())
    assert heard.total_sum is not None


@pytest.mark.parametrize(
    ("routing", "said"),
    [
        (lambda block, logits: block.topk(logits), "fails on layers.0.mlp: 'Block' object has no"),
        (lambda _block, logits: logits.topk(2)[1], "fails on layers.0.mlp: too many values"),
        (lambda _block, logits: tuple(logits.topk(2)), "must give two tensors"),
        (lambda _block, logits: ([[0]], logits), "must give two tensors"),
    ],
)
def test_a_routing_function_that_fails_gets_a_sentence(routing, said):
    with pytest.raises(UnsupportedModelError, match=f"`routing` of the layout of.*{said}"):
        run(layer_of(build(), replace(LAYOUT, routing=routing)), rows())


def test_a_router_that_runs_after_the_experts_does_not_fit():
    block = build()
    layer = replace(layer_of(block), router=block.dropout)
    with pytest.raises(DataError, match="ran on other rows than its router chose"):
        run(layer, rows())


def test_a_weighted_sum_is_that_of_a_loop():
    draw = torch.Generator().manual_seed(2)
    outputs, weights = torch.randn(5, 3, 4, generator=draw), torch.rand(5, 3, generator=draw)
    weights[2, 1], outputs[2, 1] = 0, torch.nan  # a slot that is not used
    found, places = WeightedSum(weights), torch.randperm(15, generator=draw)
    for some in places.split(4):
        found.add(outputs.reshape(15, 4)[some], some)
    for position in range(5):
        parts = [weights[position, slot] * outputs[position, slot] for slot in range(3)]
        parts = [part for part in parts if not part.isnan().any()]
        torch.testing.assert_close(found.rows[position], sum(parts))
        size = sum(float(part.square().sum()) for part in parts)
        assert found.sizes[position].item() == pytest.approx(size, rel=1e-5)
