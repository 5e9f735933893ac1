"""Models of all kinds for the criteria that run one, and plain ways to hide their experts."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

import models
import zoo
from moecollab import criteria
from moecollab.criteria.base import Needs
from moecollab.models.keep import Keep
from moecollab.models.masked import Mask
from moecollab.models.routing import find_moe_layers

NAMES = tuple(name for name in criteria.names() if Needs.MODEL in criteria.get(name).needs)
HIDING = ("leave_one_out", "leave_one_out_cos", "naee", "delta_nll")
WINDOWS = [np.random.default_rng(n).integers(3, 128, n) for n in (9, 16, 12)]


def plain(name, **changes):
    return lambda: models.build(name, **changes)


def of_modules():
    from test_remote import ours

    return models.randomised(ours.SmallMoeForCausalLM(ours.SmallMoeConfig()), 0)


SUBJECTS = {
    "mixtral": plain("mixtral", num_local_experts=6),  # weights add up to 1
    "shared": plain("qwen2_moe", num_experts=6),  # weights are shares of all experts
    "sigmoid": plain("deepseek_v3", n_routed_experts=6),  # and a bias to choose by
    "groups": plain("deepseek_v3", n_routed_experts=8, n_group=2, topk_group=1),
    "parallel": lambda: zoo.build("gemma4_text"),  # the block is the whole decoder layer
    "scaled_input": lambda: zoo.build("llama4_text/top-2"),
    "sorted": lambda: zoo.build("jetmoe"),
    "modules": of_modules,
}


@contextmanager
def hiding(model, layer, dropped):
    """Hides experts by a mask, or where the router has groups by a bias of -∞."""
    kept = tuple(e for e in range(layer.n_experts) if e not in dropped)
    if getattr(layer.router, "num_group", None) in (None, 1):
        every = {one.layer: tuple(range(one.n_experts)) for one in find_moe_layers(model)}
        with Mask(model, Keep(every | {layer.layer: kept}, layer.n_experts, layer.top_k)):
            yield
        return
    bias = layer.router.e_score_correction_bias
    before = bias.clone()
    bias[list(dropped)] = -torch.inf
    yield
    bias.copy_(before)


def block_outputs(model, layer):
    """What a block returns for every window, its arguments being those of the plain model."""
    calls, found = [], []

    def keep(_module, args, kwargs):
        calls.append(copy.deepcopy((args, kwargs)))

    handle = layer.block.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.inference_mode():
        for window in WINDOWS:
            model(input_ids=torch.from_numpy(window)[None], use_cache=False)
    handle.remove()

    def run(dropped):
        found = []
        with torch.inference_mode(), hiding(model, layer, dropped):
            for args, kwargs in copy.deepcopy(calls):
                output = layer.block(*args, **kwargs)
                output = output if isinstance(output, torch.Tensor) else output[0]
                found.append(output.reshape(-1, output.shape[-1]).double().numpy())
        return found

    assert not found
    return run


def losses(model):
    """Next-token loss of all windows, in nats."""
    total = 0.0
    with torch.inference_mode():
        for window in WINDOWS:
            ids = torch.from_numpy(window)
            logits = model(input_ids=ids[None]).logits[0]
            total += float(F.cross_entropy(logits[:-1].double(), ids[1:], reduction="sum"))
    return total


def by_hand(layer, expert, rows):
    """What an expert of Mixtral makes of rows."""
    gate, up = layer.experts.gate_up_proj[expert].detach().chunk(2)
    return (F.silu(rows @ gate.T) * (rows @ up.T)) @ layer.experts.down_proj[expert].detach().T


class Heard:
    """Ids, weights and outputs of one call of a layer's experts."""

    def routing(self, ids, weights):
        self.ids, self.weights = ids, weights
        self.rows = None

    def outputs(self, rows, places):
        if self.rows is None:
            self.rows = torch.zeros(self.ids.numel(), rows.shape[1])
        self.rows[places] = rows

    def total(self, routed):
        pass
