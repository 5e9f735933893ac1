"""One expert of any family by its definition, from the raw parameters; and who hears everything."""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers.activations import ACT2FN

TRANSPOSED = ("gpt_oss", "openai_privacy_filter", "llama4", "aria_text")
"""Families whose weights are stored as (input, output)."""

SHIFTED = ("gpt_oss", "openai_privacy_filter", "minimax_m3_vl")
CLAMPED = ("deepseek_v4", "glm5_next", "hy_v4")


class Heard:
    """A listener that keeps everything."""

    def __init__(self):
        self.ids = self.weights = self.slots = self.total_sum = None
        self.calls = 0

    def routing(self, ids, weights):
        self.ids, self.weights = ids.clone(), weights.clone()
        self.calls += 1

    def outputs(self, rows, places):
        if self.slots is None:
            self.slots = torch.full((*self.ids.shape, rows.shape[-1]), torch.nan)
        flat = self.slots.view(-1, rows.shape[-1])
        assert flat[places].isnan().all(), "a slot is told twice"
        flat[places] = rows.float()

    def total(self, routed):
        self.total_sum = routed.float().clone()


def one_expert(layer, config, number, hidden):
    """Output of one expert on all rows: (n, hidden)."""
    experts, family = layer.experts, layer.layout.family
    if family == "dbrx":
        size = experts.mlp.w1.shape[0] // layer.n_experts
        rows = slice(number * size, (number + 1) * size)
        w1, v1, w2 = (getattr(experts.mlp, name)[rows] for name in ("w1", "v1", "w2"))
        return (functional.silu(hidden @ w1.T) * (hidden @ v1.T)) @ w2
    if family == "jetmoe":
        inner = hidden @ experts.input_linear.weight[number].T
        gate, up = inner.chunk(2, dim=-1)
        return (functional.silu(gate) * up) @ experts.output_linear.weight[number].T
    name = "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"
    inner = gated(experts, config, family, _linear(experts, family, name, number, hidden))
    out = _linear(experts, family, "down_proj", number, inner)
    return experts.post_expert_norm(out) if family == "muse_spark" else out


def _linear(experts, family, name, number, hidden):
    weight = getattr(experts, name)[number]
    out = hidden @ (weight if family in TRANSPOSED else weight.T)
    bias = getattr(experts, f"{name}_bias", None)
    return out if bias is None else out + bias[number]


def gated(experts, config, family, inner):
    """What comes between the projections."""
    if family == "nemotron_h":
        return ACT2FN[config.mlp_hidden_act](inner)
    gate, up = inner.chunk(2, dim=-1)
    if family == "gpt_oss":
        gate, up = inner[..., ::2], inner[..., 1::2]
    if family in SHIFTED + CLAMPED:
        limit = config.swiglu_limit if hasattr(config, "swiglu_limit") else experts.limit
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    if family in SHIFTED:
        alpha = config.swiglu_alpha if hasattr(config, "swiglu_alpha") else experts.alpha
        return (up + 1) * gate * torch.sigmoid(alpha * gate)
    if family == "inkling2":
        return experts.act_fn(gate, up)
    return (functional.silu if family in CLAMPED else experts.act_fn)(gate) * up


def routed_sum(layer, config, hidden, heard):
    """What a layer's experts add, from ids, weights and parameters: (n, hidden)."""
    total = torch.zeros_like(hidden)
    for number in range(layer.n_experts):
        weight = (heard.weights * (heard.ids == number)).sum(dim=1, keepdim=True)
        if layer.layout.family == "llama4":
            total += one_expert(layer, config, number, weight * hidden)
        else:
            total += weight * one_expert(layer, config, number, hidden)
    identity = (heard.weights * (heard.ids >= layer.n_experts)).sum(dim=1, keepdim=True)
    return total + identity * hidden


class Spy:
    """Rows that go into a layer's experts and what their weighted sum is, without recording."""

    def __init__(self, layer):
        self.layer = layer
        self.hidden = self.output = None
        self.handles = [layer.experts.register_forward_hook(self._container, with_kwargs=True)]
        if layer.layout.family == "llama4":
            self.handles.append(layer.router.register_forward_hook(self._router))

    def _router(self, _module, args, _output):
        self.hidden = args[0].clone()

    def _container(self, _module, args, kwargs, output):
        family = self.layer.layout.family
        out = output.detach().clone()
        if family == "llama4":
            self.output = out.view(self.layer.n_experts, -1, out.shape[-1]).sum(dim=0)
            return
        if family == "jetmoe":
            out = out - self.layer.experts.bias
        given = args[0] if args else next(iter(kwargs.values()))
        self.hidden = given.detach().reshape(-1, given.shape[-1]).clone()
        self.output = out.reshape(-1, out.shape[-1])

    def remove(self):
        for handle in self.handles:
            handle.remove()
